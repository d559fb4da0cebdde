// The residual stream of chapter 05. data: tokens, start (the token shown first), parts, words, and for each part and
// token says = [word, tenths of a percent, ...] and lengths in tenths; without: the same as says at the end of the model,
// for each branch that is left out.

function draw(root, data, kit) {
  const last = data.parts.length - 1;
  const state = { token: data.start, part: last, out: "" };
  const story = kit.el("div", { style: "line-height:2;white-space:pre-wrap;margin-bottom:0.75rem;font-size:1.05rem" });
  const picture = kit.el("div", { style: "max-width:430px" });
  const readout = kit.readout();
  let ready = false; // the controls report their first value one by one; draw once all have
  const change = (set) => (value) => {
    set(value);
    if (ready) show();
  };
  const token = kit.slider({
    label: "token", min: 0, max: data.tokens.length - 1, value: state.token, format: (i) => `${i} of ${data.tokens.length - 1}`,
    change: change((i) => (state.token = i)),
  });
  const part = kit.slider({
    label: "added so far", min: 0, max: last, value: last, format: (i) => data.parts[i], change: change((i) => (state.part = i)),
  });
  const out = kit.select({
    label: "leave out", options: [["", "nothing"], ...data.parts.slice(1).map((name) => [name, name])], value: "",
    change: change((name) => (state.out = name)),
  });
  const set = (control, value) => {
    const input = control.querySelector("input");
    input.value = value;
    input.dispatchEvent(new Event("input"));
  };
  root.append(kit.controls(token, part), kit.controls(out), story, picture, readout);
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    story.replaceChildren(...data.tokens.map((word, i) => piece(word, i, state.token, () => set(token, i), kit)));
    picture.replaceChildren(tower(data, state, (i) => set(part, i), kit));
    readout.textContent = sentence(data, state);
  }
}

const quoted = (word) => `“${word.trim() || "␣"}”`;
const percent = (tenths) => (tenths > 994 ? "nearly 100 %" : tenths < 5 ? "less than 1 %" : `${Math.round(tenths / 10)} %`);
const pairs = (list, words) => list.filter((_, i) => i % 2 === 0).map((word, i) => [words[word], list[2 * i + 1]]);

// A token of the story; what comes after the chosen one is faint, for the token cannot see it.
function piece(word, i, chosen, pick, kit) {
  const look = "padding:0.15em 0;border-radius:3px;cursor:pointer;" +
    (i === chosen ? "outline:2px solid var(--tf-vermilion);" : "") + (i > chosen ? "color:var(--tf-muted);" : "");
  return kit.el("span", { style: look, onclick: pick }, word);
}

// The additions, read upwards: what each adds to, the likeliest next token after it as a bar, and the vector's length.
function tower(data, state, pick, kit) {
  const [width, height, bar] = [430, 34, 110];
  const count = data.parts.length;
  const text = (x, y, anchor, words, bold) =>
    kit.svg("text", { x, y, "text-anchor": anchor, "font-size": 14, "font-weight": bold ? 700 : 400 }, words);
  const rows = data.parts.map((name, i) => {
    const y = height * (count - i);
    const [word, share] = pairs(data.says[i][state.token], data.words)[0];
    const colour = name.startsWith("attention") ? "var(--tf-blue)" : name.startsWith("feed") ? "var(--tf-orange)" : "var(--tf-green)";
    const box = kit.svg("rect", { x: 2, y, width: 124, height: height - 8, rx: 5, style: `fill:${colour};opacity:0.25` });
    const frame = i === state.part ? kit.svg("rect", { x: 2, y, width: 124, height: height - 8, rx: 5, style: "fill:none;stroke:var(--tf-vermilion);stroke-width:2" }) : [];
    const parts = [
      box, frame, text(64, y + 18, "middle", name, i === state.part), text(216, y + 18, "end", word.trim() || "␣", i === state.part),
      kit.svg("rect", { x: 224, y: y + 3, width: Math.max(1, (bar * share) / 1000), height: height - 14, rx: 3, style: "fill:var(--tf-blue);opacity:0.8" }),
      text(342, y + 18, "start", percent(share).replace("nearly ", "").replace("less than ", "< ")), text(width - 2, y + 18, "end", (data.lengths[i][state.token] / 10).toFixed(1)),
    ];
    return kit.svg("g", { style: `cursor:pointer;opacity:${i > state.part ? 0.7 : 1}`, onclick: () => pick(i) }, parts);
  });
  const heads = [text(64, 18, "middle", "adds", true), text(216, 18, "end", "names", true), text(224, 18, "start", "probability", true), text(width - 2, 18, "end", "length", true)];
  const [word, share] = pairs(data.says[state.part][state.token], data.words)[0];
  const label = `The stream of ${quoted(data.tokens[state.token])}, ${count} additions; after ${data.parts[state.part]} it names ${quoted(word)} with ${percent(share)}`;
  return kit.picture(width, height * (count + 1) + 2, label, heads, rows);
}

function sentence(data, state) {
  const list = (says) => pairs(says, data.words).map(([word, share]) => `${quoted(word)} ${percent(share)}`).join(", ");
  const here = quoted(data.tokens[state.token]);
  const now = `If the model stopped after ${data.parts[state.part]}, it would go on from ${here} with ${list(data.says[state.part][state.token])}.`;
  const next = state.token + 1 < data.tokens.length ? ` The story goes on with ${quoted(data.tokens[state.token + 1])}.` : " Here the story ends.";
  if (!state.out) return now + next;
  const which = data.parts.indexOf(state.out) - 1;
  return `${now}${next} Without ${state.out} the whole model says ${list(data.without[which][state.token])}.`;
}
