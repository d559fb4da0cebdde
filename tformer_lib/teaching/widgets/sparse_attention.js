const CELL = 10;
const LEFT = 26;
const TOP = 22;

// A pattern from five parts; a query is at row q, a key at column k.
function draw(root, data, kit) {
  const state = { window: 5, step: 1, stride: 0, globals: 0, causal: true, layers: 1 };
  const figure = kit.el("div", {});
  const readout = kit.readout();
  let ready = false;
  const change = (part) => (value) => {
    state[part] = value;
    if (ready) show();
  };
  const off = (n) => (n === 0 ? "none" : String(n));
  root.append(
    kit.controls(
      kit.slider({ label: "window", min: 0, max: 16, value: state.window, format: off, change: change("window") }),
      kit.slider({ label: "dilation", min: 1, max: 8, value: state.step, change: change("step") }),
      kit.slider({ label: "stride", min: 0, max: 12, value: state.stride, format: off, change: change("stride") }),
      kit.slider({ label: "global tokens", min: 0, max: 4, value: state.globals, format: off, change: change("globals") }),
      kit.slider({ label: "layers", min: 1, max: 8, value: state.layers, change: change("layers") }),
      kit.checkbox({ label: "causal", value: state.causal, change: change("causal") }),
    ),
    figure,
    readout,
  );
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    const mask = pairs(state, data.length);
    const reach = spread(mask, state.layers);
    const live = liveBlocks(mask, data.block);
    const text = sentence(mask, reach, live, state, data);
    figure.replaceChildren(picture(mask, reach, live, text, data, kit));
    readout.textContent = text;
  }
}

function allowed(state, q, k) {
  const distance = q - k;
  if (state.causal && distance < 0) return false;
  const away = Math.abs(distance);
  const inWindow = state.window > 0 && away % state.step === 0 && away / state.step < state.window;
  const onStride = state.stride > 0 && away % state.stride === 0;
  return inWindow || onStride || q < state.globals || k < state.globals;
}

const pairs = (state, n) => Array.from({ length: n }, (_, q) => Array.from({ length: n }, (_, k) => allowed(state, q, k)));

// Who can have reached whom after some layers; every token keeps its own state.
function spread(mask, layers) {
  const step = mask.map((row, q) => row.map((seen, k) => seen || q === k));
  let reach = step;
  for (let layer = 1; layer < layers; layer++) {
    reach = reach.map((row) => row.map((_, k) => row.some((known, m) => known && step[m][k])));
  }
  return reach;
}

function liveBlocks(mask, block) {
  const n = Math.ceil(mask.length / block);
  const live = Array.from({ length: n }, () => Array(n).fill(false));
  mask.forEach((row, q) => row.forEach((seen, k) => {
    if (seen) live[Math.floor(q / block)][Math.floor(k / block)] = true;
  }));
  return live;
}

const count = (table) => table.flat().filter(Boolean).length;
const percent = (part, whole) => `${Math.round((100 * part) / whole)} %`;

function sentence(mask, reach, live, state, data) {
  const n = data.length;
  const past = state.causal ? (n * (n + 1)) / 2 : n * n;
  const word = state.layers === 1 ? "1 layer" : `${state.layers} layers`;
  return (
    `Pairs kept: ${percent(count(mask), n * n)} of all. Live blocks of ${data.block}: ${count(live)} of ${live.length ** 2}. ` +
    `After ${word}, the last token can know of ${count([reach[n - 1]])} of ${n} positions, and ${percent(count(reach), past)} of the pairs ${state.causal ? "that causality permits " : ""}are in reach.`
  );
}

function picture(mask, reach, live, text, data, kit) {
  const n = data.length;
  const size = CELL * n;
  const cell = (q, k, share) =>
    kit.svg("rect", { x: LEFT + CELL * k, y: TOP + CELL * q, width: CELL, height: CELL, style: `fill:${kit.shade(share)}` });
  const cells = [];
  for (let q = 0; q < n; q++) {
    for (let k = 0; k < n; k++) {
      if (mask[q][k]) cells.push(cell(q, k, 1));
      else if (reach[q][k]) cells.push(cell(q, k, 0.3));
    }
  }
  const blocks = live.flatMap((row, r) =>
    row.map((alive, c) => (alive ? kit.svg("rect", {
      x: LEFT + CELL * data.block * c, y: TOP + CELL * data.block * r, width: CELL * data.block, height: CELL * data.block,
      fill: "none", style: `stroke:${kit.colours[1]}`, "stroke-width": 1.2,
    }) : null)),
  );
  return kit.picture(
    LEFT + size + 4, TOP + size + 22, text,
    kit.svg("text", { x: LEFT, y: 14, "font-size": 12 }, "key →   strong: meet, faint: in reach, frame: computed"),
    kit.svg("text", { x: 0, y: 0, "font-size": 12, transform: `translate(14 ${TOP + size / 2}) rotate(-90)`, "text-anchor": "middle" }, "← query"),
    kit.svg("rect", { x: LEFT, y: TOP, width: size, height: size, fill: "none", stroke: "currentColor", opacity: 0.5 }),
    cells,
    blocks.filter(Boolean),
  );
}
