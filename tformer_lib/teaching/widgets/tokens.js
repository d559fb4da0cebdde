// The merge stepper. data.steps: [{merged, pairs: [[left, right, count], ...], words: [[times, [token, ...]], ...]}, ...]
// The first step is the text before any merge.

function draw(root, data, kit) {
  const said = kit.readout();
  const counts = kit.el("div", {});
  const words = kit.el("div", { class: "tf-scroll" });
  const show = (number) => {
    const step = data.steps[number];
    said.textContent = sentence(step, data.steps[number - 1]);
    counts.replaceChildren(...(step.pairs.length ? [bars(step, kit)] : []));
    words.replaceChildren(...step.words.map((word) => row(word, step.merged, kit)));
  };
  root.append(kit.stepper({ steps: data.steps.length, change: show }), said, counts, words);
}

const total = (step) => step.words.reduce((sum, [times, tokens]) => sum + times * tokens.length, 0);

function sentence(step, before) {
  if (!before) return `Before any merge, the text has ${total(step)} tokens: its bytes.`;
  const [left, right, count] = step.pairs[0];
  const tie = step.pairs.filter((pair) => pair[2] === count).length > 1 ? ", the greatest of those seen as often," : "";
  return `“${left}” + “${right}”${tie} is seen ${count} times, and becomes “${step.merged}”: ${total(before)} tokens are now ${total(step)}.`;
}

// The counts before the merge; the pair that is merged stands first, in another colour, and has a sign beside it.
function bars({ pairs }, kit) {
  const most = pairs[0][2];
  const lines = pairs.flatMap(([left, right, count], i) => {
    const [y, end] = [26 * i, 112 + (150 * count) / most];
    return [
      kit.svg("text", { x: 104, y: y + 18, "text-anchor": "end", "font-size": 15 }, `${left} + ${right}`),
      kit.svg("rect", { x: 112, y: y + 4, height: 18, rx: 2, width: end - 112, style: `fill:${kit.colours[i ? 5 : 1]}` }),
      kit.svg("text", { x: end + 6, y: y + 18, "font-size": 15 }, i ? count : `${count} ← merged`),
    ];
  });
  return kit.picture(370, 26 * pairs.length + 10, `Counts of the most frequent pairs: ${pairs.map(([left, right, count]) => `${left} + ${right} ${count}`).join(", ")}`, lines);
}

// One word: how often it occurs, and its tokens as boxes; the newest token is filled.
function row([times, tokens], merged, kit) {
  const box = (token) =>
    kit.el("code", { style: `display:inline-block;padding:0 .4em;margin:0 .15em .2em 0;border:1px solid var(--tf-line);border-radius:4px;` +
      `color:var(--tf-ink);background:${token === merged ? kit.shade(0.3, kit.colours[1]) : "var(--tf-raised)"}` }, token);
  return kit.el("div", { style: "white-space:nowrap" }, kit.el("span", { style: "display:inline-block;min-width:3em" }, `${times} ×`), tokens.map(box));
}
