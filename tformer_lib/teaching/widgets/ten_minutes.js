// The desk of chapter 00. data: choices: [[what, [words]], ...], words, head, and states, one for each combination of the
// choices (the last one changes fastest): tokens, next, without = for each token [word, tenths of a percent, ...] of the
// likeliest next words, and looks = the lower triangle of one head's weights, two hexadecimal digits each.

function draw(root, data, kit) {
  const chosen = data.choices.map(() => 0);
  const T = data.states[0].tokens.length;
  const state = { read: T - 3, silent: false };
  const story = kit.el("div", { style: "line-height:2;white-space:pre-wrap;margin-bottom:0.75rem;font-size:1.05rem" });
  const bars = kit.el("div", { style: "max-width:430px" });
  const readout = kit.readout();
  let ready = false; // the controls report their first value one by one; draw once all have
  const change = (set) => (value) => {
    set(value);
    if (ready) show();
  };
  const selects = data.choices.map(([what, words], i) =>
    kit.select({ label: what, options: words.map((word, j) => [j, word]), value: 0, change: change((j) => (chosen[i] = Number(j))) }),
  );
  const slider = kit.slider({
    label: "the model has read", min: 1, max: T - 1, value: state.read, format: (i) => `${i} of ${T - 1} tokens`,
    change: change((i) => (state.read = Number(i))),
  });
  const silence = kit.checkbox({ label: `silence ${data.head}`, change: change((on) => (state.silent = on)) });
  const pick = (i) => {
    const input = slider.querySelector("input");
    input.value = i;
    input.dispatchEvent(new Event("input"));
  };
  root.append(kit.controls(...selects), kit.controls(slider, silence), story, bars, readout);
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    const index = chosen.reduce((sum, choice, i) => sum * data.choices[i][1].length + choice, 0);
    const found = data.states[index];
    const [at, row] = [state.read, rowOf(found.looks, state.read)];
    story.replaceChildren(
      ...found.tokens.slice(1).map((token, i) => piece(data.words[token], i + 1, at, state.silent ? [] : row, pick, kit)),
    );
    const likely = pairs((state.silent ? found.without : found.next)[at], data.words);
    const truth = at + 1 < T ? data.words[found.tokens[at + 1]] : "";
    bars.replaceChildren(chart(likely, truth, kit));
    readout.textContent = sentence(data.words[found.tokens[at]], likely, truth, row, found, data, state);
  }
}

const rowOf = (triangle, query) =>
  Array.from({ length: query + 1 }, (_, k) => parseInt(triangle.substr(query * (query + 1) + 2 * k, 2), 16) / 255);
const pairs = (list, words) => list.filter((_, i) => i % 2 === 0).map((word, i) => [words[word], list[2 * i + 1] / 1000]);
const quoted = (word) => `“${word.trim() || "␣"}”`;
const percent = (share) => (share > 0.994 ? "nearly 100 %" : share < 0.005 ? "less than 1 %" : `${Math.round(100 * share)} %`);

// A token of the story: shaded by the weight that the head gives it; what the model has not read yet is faint.
function piece(word, i, at, row, pick, kit) {
  const ground = i < row.length && row[i] > 0.02 ? kit.shade(0.45 * row[i]) : "none";
  const look = `background:${ground};padding:0.15em 0;border-radius:3px;cursor:pointer;` +
    (i === at ? "outline:2px solid var(--tf-vermilion);" : "") + (i > at ? "color:var(--tf-muted);" : "");
  return kit.el("span", { style: look, onclick: () => pick(i) }, word);
}

// The likeliest next tokens as bars; the one that the story goes on with is marked.
function chart(likely, truth, kit) {
  const [left, height, width] = [96, 30, 430];
  const rows = likely.map(([word, share], i) => {
    const y = height * i;
    const right = word === truth;
    const colour = right ? "var(--tf-vermilion)" : "var(--tf-blue)";
    return [
      kit.svg("text", { x: left - 10, y: y + 20, "text-anchor": "end", "font-size": 15, "font-weight": right ? 700 : 400 }, word.trim() || "␣"),
      kit.svg("rect", { x: left, y: y + 4, width: Math.max(1, (width - left - 104) * share), height: height - 8, rx: 3, style: `fill:${colour};opacity:0.8` }),
      kit.svg("text", { x: left + 8 + Math.max(1, (width - left - 104) * share), y: y + 20, "font-size": 14 }, percent(share)),
    ];
  });
  const said = likely.map(([word, share]) => `${word.trim()} ${percent(share)}`).join(", ");
  return kit.picture(width, height * likely.length + 2, `The likeliest next tokens: ${said}`, rows);
}

function sentence(here, likely, truth, row, found, data, state) {
  const [word, share] = likely[0];
  const next = truth ? ` The story goes on with ${quoted(truth)}.` : " Here the story ends.";
  const expects = `After ${quoted(here)} the model expects ${quoted(word)} with ${percent(share)}.${next}`;
  if (state.silent) return `${expects} ${data.head[0].toUpperCase()}${data.head.slice(1)} is silent.`;
  const most = row.indexOf(Math.max(...row));
  return `${expects} Its ${data.head} gives ${percent(row[most])} of its attention to ${quoted(data.words[found.tokens[most]])}.`;
}
