// The mask builder. data: tokens, and masks as rows of "0" and "1": everyone, causal, documents, and lists by size - 1:
// window, prefix, padding.

const CELL = 20; // so that a phone shows all columns, and their names large enough to read
const LEFT = 92; // room for the queries' names
const TOP = 68; // room for the keys' names
const FONT = 14.5;

const BASES = [
  ["everyone", "everyone"],
  ["causal", "causal"],
  ["window", "sliding window"],
  ["prefix", "prefix"],
];
const MISTAKES = [
  ["none", "none"],
  ["inverted", "the mask is inverted"],
  ["topleft", "aligned to the top left"],
];

function draw(root, data, kit) {
  const S = data.tokens.length;
  const state = { base: "causal", size: 3, real: S, documents: false, T: S, mistake: "none", query: S - 1 };
  const grid = kit.el("div", {});
  const readout = kit.readout();
  let ready = false; // the controls report their first value one by one; draw once all have
  const change = (part) => (value) => {
    state[part] = value;
    if (ready) show();
  };

  const size = kit.slider({ label: "size", min: 1, max: S, value: state.size, change: change("size") });
  const query = kit.slider({
    label: "query", min: 0, max: S - 1, value: state.query, change: change("query"),
    format: (i) => `${i}, ${data.tokens[i]}`,
  });
  root.append(
    kit.controls(
      kit.select({ label: "who may look", options: BASES, value: state.base, change: change("base") }),
      size,
      kit.slider({ label: "real tokens", min: 1, max: S, value: S, change: change("real") }),
      kit.checkbox({ label: "two documents", change: change("documents") }),
    ),
    kit.controls(
      kit.slider({ label: "queries: the last", min: 1, max: S, value: S, change: change("T") }),
      kit.select({ label: "mistake", options: MISTAKES, value: "none", change: change("mistake") }),
      query,
    ),
    grid,
    readout,
  );
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    size.style.display = state.base === "window" || state.base === "prefix" ? "" : "none";
    const rows = build(state, data);
    const first = S - state.T; // the position of the first query
    const slider = query.querySelector("input");
    if (Number(slider.min) !== first) {
      slider.min = first; // the slider offers the queries that are there, and moves to one of them
      slider.dispatchEvent(new Event("input"));
      return;
    }
    const chosen = state.query - first;
    const pick = (i) => {
      slider.value = first + i;
      slider.dispatchEvent(new Event("input"));
    };
    grid.replaceChildren(picture(rows, first, chosen, data.tokens, pick, kit));
    readout.textContent = sentence(rows, first, chosen, data.tokens);
  }
}

// The rows of the mask: one array of booleans for each of the last T queries.
function build(state, data) {
  const S = data.tokens.length;
  const base = Array.isArray(data[state.base][0]) ? data[state.base][state.size - 1] : data[state.base];
  const wrongEnd = state.mistake === "topleft";
  const rows = wrongEnd ? base.slice(0, state.T) : base.slice(S - state.T);
  return rows.map((row, i) => {
    const position = S - state.T + i;
    return [...row].map((bit, j) => {
      const real = data.padding[state.real - 1][position][j] === "1";
      const sameDocument = !state.documents || data.documents[position][j] === "1";
      const allowed = bit === "1" && real && sameDocument;
      return state.mistake === "inverted" ? !allowed : allowed;
    });
  });
}

// Keys from left to right, queries from top to bottom. A visible future is marked by colour and by a cross.
function picture(rows, first, chosen, tokens, pick, kit) {
  const [T, S] = [rows.length, tokens.length];
  const keys = tokens.map((token, j) =>
    kit.svg("text", {
      transform: `translate(${LEFT + CELL * (j + 0.5) + 4} ${TOP - 8}) rotate(-50)`, "font-size": FONT,
    }, token),
  );
  const queries = rows.map((_, i) =>
    kit.svg("text", {
      x: LEFT - 8, y: TOP + CELL * (i + 0.5) + 5, "text-anchor": "end", "font-size": FONT,
      "font-weight": i === chosen ? 700 : 400, style: "cursor:pointer", onclick: () => pick(i),
    }, `${first + i} ${tokens[first + i]}`),
  );
  const cells = rows.flatMap((row, i) => row.map((seen, j) => cell(seen, i, j, first + i, pick, kit)));
  const frame = kit.svg("rect", {
    x: LEFT - 1, y: TOP + CELL * chosen - 1, width: CELL * S + 2, height: CELL + 2, fill: "none", rx: 3,
    style: "stroke:var(--tf-ink);stroke-width:2.5;pointer-events:none",
  });
  const label = `Grid of ${T} queries by ${S} keys; filled cells may be looked at.`;
  return kit.picture(LEFT + CELL * S + 24, TOP + CELL * T + 6, label, ...keys, ...queries, ...cells, frame);
}

function cell(seen, i, j, position, pick, kit) {
  const [x, y] = [LEFT + CELL * j, TOP + CELL * i];
  const future = seen && j > position;
  const fill = future ? "var(--tf-vermilion)" : seen ? "var(--tf-blue)" : "var(--tf-surface)";
  const square = kit.svg("rect", {
    x: x + 1, y: y + 1, width: CELL - 2, height: CELL - 2, rx: 3, style: `fill:${fill};stroke:var(--tf-line)`,
  });
  const cross = future && kit.svg("path", {
    d: `M${x + 6} ${y + 6}l8 8m0 -8l-8 8`, style: "stroke:var(--tf-surface);stroke-width:2.5;fill:none",
  });
  const itself = j === position && kit.svg("circle", {
    cx: x + CELL / 2, cy: y + CELL / 2, r: 3, style: `fill:${seen ? "var(--tf-surface)" : "var(--tf-muted)"}`,
  });
  return kit.svg("g", { style: "cursor:pointer", onclick: () => pick(i) }, square, ...[cross, itself].filter(Boolean));
}

// What the chosen query sees, and what is wrong with the mask as a whole.
function sentence(rows, first, chosen, tokens) {
  const count = (list) => list.filter(Boolean).length;
  const position = first + chosen;
  const seen = tokens.filter((_, j) => rows[chosen][j]);
  const sees = seen.length ? `may look at ${seen.length} of ${tokens.length} keys: ${seen.join(", ")}` : "may look at nothing, and gets zeros";
  const peeking = count(rows.map((row, i) => row.some((s, j) => s && j > first + i)));
  const blind = count(rows.map((row) => !row.some(Boolean)));
  const kept = count(rows.flat());
  const notes = [
    `Query ${position}, "${tokens[position]}", ${sees}.`,
    `The mask keeps ${kept} of ${rows.length * tokens.length} pairs.`,
    peeking ? `${peeking} of ${rows.length} queries see the future (crosses).` : "No query sees the future.",
    blind ? `${blind} see nothing.` : "",
  ];
  return notes.filter(Boolean).join(" ");
}
