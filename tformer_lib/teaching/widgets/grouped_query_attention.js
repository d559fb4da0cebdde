// The memory calculator. data: models [{name, heads, own, latent, choices: [[kv heads, numbers per token, parameters], ...]}],
// gpus [{name, bytes, rate}], and the first model and gpu.
// Several GPUs divide the weights and the heads among them (tensor parallelism). A KV head is not divided: where there
// are fewer of them than GPUs, some GPUs hold copies, and a latent, which serves all heads, is on every GPU.

const CACHE_TYPES = [["2", "bfloat16"], ["4", "float32"], ["1", "8 bits"], ["0.5", "4 bits"]];

function draw(root, data, kit) {
  const state = { model: data.model, gpu: data.gpu, choice: 0, context: 13, batch: 4, cache: 2, weights: 2, split: 0 };
  const picture = kit.el("div", {});
  const readout = kit.readout();
  let ready = false;
  const change = (part) => (value) => {
    state[part] = Number(value);
    if (part === "model") offerHeads();
    if (ready) show();
  };
  const power = (n) => (2 ** n).toLocaleString("en");
  const heads = kit.el("div", { style: "display:contents" });
  const named = (list) => list.map((one, i) => [String(i), one.name]);

  // A model has as many choices of kv heads as its heads have divisors: make the slider anew, at the model's own number.
  function offerHeads() {
    const { choices, own, latent } = data.models[state.model];
    state.choice = choices.findIndex(([kv]) => kv === own);
    if (latent) return heads.replaceChildren();
    heads.replaceChildren(kit.slider({
      label: "kv heads", min: 0, max: choices.length - 1, value: state.choice, change: change("choice"),
      format: (i) => `${choices[i][0]}${choices[i][0] === own ? " (its own)" : ""}`,
    }));
  }

  offerHeads();
  root.append(
    kit.controls(
      kit.select({ label: "model", options: named(data.models), value: state.model, change: change("model") }),
      heads,
      kit.slider({ label: "tokens each", min: 7, max: 20, value: state.context, format: power, change: change("context") }),
      kit.slider({ label: "sequences", min: 0, max: 10, value: state.batch, format: power, change: change("batch") }),
      kit.select({ label: "cache in", options: CACHE_TYPES, value: "2", change: change("cache") }),
      kit.select({ label: "weights in", options: CACHE_TYPES, value: "2", change: change("weights") }),
      kit.select({ label: "GPU", options: named(data.gpus), value: state.gpu, change: change("gpu") }),
      kit.slider({ label: "GPUs", min: 0, max: 3, value: state.split, format: power, change: change("split") }),
    ),
    picture,
    readout,
  );
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    const now = count(state, data, state.choice);
    const text = sentence(now, state, data);
    picture.replaceChildren(bars(now, state, data, kit), choicesTable(state, data, kit));
    readout.textContent = text;
  }
}

// Bytes on each GPU of the weights, of a token, of a sequence and of the whole cache, for one choice of kv heads.
function count(state, data, choice) {
  const [kv, numbers, parameters] = data.models[state.model].choices[choice];
  const gpus = 2 ** state.split;
  const token = (numbers * state.cache * Math.ceil(kv / gpus)) / kv;
  const sequence = token * 2 ** state.context;
  const weights = (parameters * state.weights) / gpus;
  const gpu = data.gpus[state.gpu];
  const room = Math.max(0, Math.floor((gpu.bytes - weights) / sequence));
  return { kv, token, sequence, weights, cache: sequence * 2 ** state.batch, room };
}

function short(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB", "PB"];
  const step = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(bytes, 1)) / 3)));
  const value = bytes / 1000 ** step;
  return `${value >= 100 || step === 0 ? Math.round(value).toLocaleString("en") : value.toPrecision(3)} ${units[step]}`;
}

function sentence(now, state, data) {
  const gpu = data.gpus[state.gpu];
  const all = now.weights + now.cache;
  const fits = all <= gpu.bytes ? "fits" : "does not fit";
  const each = state.split ? `On each of ${2 ** state.split} GPUs, a` : "A";
  const { latent } = data.models[state.model];
  const copies = 2 ** state.split > now.kv ? ` (${latent ? "every GPU holds the whole latent" : "some GPUs hold the same heads"})` : "";
  const bound = 1000 * (all / gpu.rate);
  return (
    `${each} token takes ${short(now.token)}${copies}, a sequence of ${(2 ** state.context).toLocaleString("en")} tokens ${short(now.sequence)}. ` +
    `${(2 ** state.batch).toLocaleString("en")} of them and the weights are ${short(all)}: this ${fits} in ${short(gpu.bytes)}, where there is room for ${now.room.toLocaleString("en")}. ` +
    (all <= gpu.bytes ? `A decode step that reads all of it takes ${bound < 0.1 ? "less than 0.1" : bound.toPrecision(2)} ms at least.` : "")
  ).trim();
}

// One bar for the memory: weights, then cache, and a line where the GPU ends.
function bars(now, state, data, kit) {
  const font = window.innerWidth < 520 ? 22 : 13;
  const [width, top, height] = [620, 1.6 * font, 34];
  const gpu = data.gpus[state.gpu];
  const all = now.weights + now.cache;
  const x = (bytes) => (width * bytes) / Math.max(all, gpu.bytes);
  const edge = Math.min(x(gpu.bytes), width);
  const label = `Weights ${short(now.weights)}, cache ${short(now.cache)}, memory ${short(gpu.bytes)}`;
  return kit.picture(width, top + height + 1.9 * font, label,
    kit.svg("text", { x: 0, y: font, "font-size": font }, `weights ${short(now.weights)} (plain), cache ${short(now.cache)} (striped)`),
    kit.svg("defs", {}, kit.svg("pattern", { id: "tf-stripes", width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      kit.svg("rect", { width: 8, height: 8, style: `fill:${kit.shade(0.35, kit.colours[1])}` }),
      kit.svg("rect", { width: 3, height: 8, style: `fill:${kit.colours[1]}` }))),
    kit.svg("rect", { x: 0, y: top, width: x(gpu.bytes), height, fill: "none", style: "stroke:var(--tf-line)" }),
    kit.svg("rect", { x: 0, y: top, width: x(now.weights), height, style: `fill:${kit.colours[0]}` }),
    kit.svg("rect", { x: x(now.weights), y: top, width: x(now.cache), height, fill: "url(#tf-stripes)" }),
    kit.svg("line", { x1: Math.min(x(gpu.bytes), width - 1.5), x2: Math.min(x(gpu.bytes), width - 1.5), y1: top - 4, y2: top + height + 6, style: "stroke:var(--tf-ink)", "stroke-width": 3 }),
    kit.svg("text", { x: edge, y: top + height + 1.5 * font, "font-size": font, "text-anchor": edge > width / 2 ? "end" : "start" }, `the GPU's ${short(gpu.bytes)}`),
  );
}

// What each number of kv heads would take, the chosen one in bold.
function choicesTable(state, data, kit) {
  const { choices, heads, own, latent } = data.models[state.model];
  const pad = "padding:0.1rem min(0.6rem, 1.4vw)"; // four columns on a phone
  const cell = (text, bold) => kit.el("td", { style: `${pad};text-align:right;font-variant-numeric:tabular-nums${bold ? ";font-weight:700" : ""}` }, text);
  const head = (text) => kit.el("th", { scope: "col", style: `${pad};text-align:right` }, text);
  const name = (kv) => (latent ? "MLA" : kv === heads ? `${kv} MHA` : kv === 1 ? "1 MQA" : `${kv}`);
  const rows = choices.map(([kv], i) => {
    const one = count(state, data, i);
    const texts = [`${name(kv)}${kv === own && !latent ? " *" : ""}`, short(one.token), short(one.cache), one.room.toLocaleString("en")];
    return kit.el("tr", {}, texts.map((text) => cell(text, i === state.choice)));
  });
  const table = kit.el("table", { style: "margin:0.5rem auto 0;border-collapse:collapse;color:inherit;font-size:min(0.9rem, 3.5vw);white-space:nowrap" },
    kit.el("thead", {}, kit.el("tr", {}, ["kv heads", "per token", "cache", "room for"].map(head))),
    kit.el("tbody", {}, rows));
  return kit.el("div", { class: "tf-scroll", tabindex: 0, role: "group", "aria-label": "what each number of kv heads takes (* the model's own)" }, table);
}
