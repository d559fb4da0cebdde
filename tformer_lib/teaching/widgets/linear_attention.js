const FIRST = 6; // the shortest text is 2^6 tokens
const LAST = 20;

function draw(root, data, kit) {
  const state = { head: 6, map: "d", tokens: 12, count: "operations" };
  const figure = kit.el("div", {});
  const readout = kit.readout();
  let ready = false;
  const change = (part) => (value) => {
    state[part] = value;
    if (ready) show();
  };
  const power = (n) => (2 ** n).toLocaleString("en");
  root.append(
    kit.controls(
      kit.select({
        label: "count",
        options: [["operations", "operations of a pass"], ["decode", "operations of the next token"], ["memory", "bytes kept to decode"]],
        value: state.count, change: change("count"),
      }),
      kit.slider({ label: "head width d", min: 4, max: 8, value: state.head, format: power, change: change("head") }),
      kit.select({
        label: "features",
        options: [["d", "d (elu + 1, ReLU)"], ["4d", "4 d (random features)"], ["taylor", "1 + d + d² (Taylor)"]],
        value: state.map, change: change("map"),
      }),
      kit.slider({ label: "tokens N", min: FIRST, max: LAST, value: state.tokens, format: power, change: change("tokens") }),
    ),
    figure,
    readout,
  );
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    const text = sentence(state, data);
    figure.replaceChildren(plot(state, data, text, kit));
    readout.textContent = text;
  }
}

const features = (map, d) => ({ d, "4d": 4 * d, taylor: 1 + d + d * d })[map];

// What one causal head costs for N tokens: [softmax, linear].
function cost(state, data, N) {
  const d = 2 ** state.head;
  const D = features(state.map, d);
  const C = Math.min(data.chunk, N);
  return {
    operations: [4 * N * N * d, 2 * N * C * (D + d) + 4 * N * D * d],
    decode: [4 * N * d, 4 * D * d],
    memory: [2 * N * d * data.bytes, D * (d + 1) * data.bytes],
  }[state.count];
}

function short(x) {
  const units = ["", " thousand", " million", " billion", " trillion", " quadrillion"];
  const step = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(x) / 3)));
  return `${Number((x / 1000 ** step).toPrecision(3))}${units[step]}`;
}

const raised = (power) => [...String(power)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");

// The number of tokens at which both cost the same, null if softmax is cheaper up to the last.
function crossing(state, data) {
  const lost = (N) => {
    const [softmax, linear] = cost(state, data, N);
    return linear - softmax;
  };
  let [low, high] = [1, 2 ** LAST];
  if (lost(high) > 0) return null;
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (lost(middle) > 0) low = middle;
    else high = middle;
  }
  return high;
}

function sentence(state, data) {
  const N = 2 ** state.tokens;
  const [softmax, linear] = cost(state, data, N);
  const unit = state.count === "memory" ? "bytes" : "operations";
  const better = softmax >= linear ? `linear costs ${short(softmax / linear)} times less` : `softmax costs ${short(linear / softmax)} times less`;
  const cross = crossing(state, data);
  const where = cross === null ? "Up to a million tokens softmax is cheaper." : `Linear is cheaper above ${cross.toLocaleString("en")} tokens.`;
  return `${N.toLocaleString("en")} tokens: softmax ${short(softmax)} ${unit}, linear ${short(linear)} ${unit}; ${better}. ${where}`;
}

function plot(state, data, text, kit) {
  const font = window.innerWidth < 520 ? 20 : 13; // the picture shrinks to the width of a phone
  const BOX = { left: 4.2 * font, top: 2.2 * font, width: 460, height: 240 };
  const lengths = [...Array(LAST - FIRST + 1).keys()].map((i) => i + FIRST);
  const curves = lengths.map((n) => cost(state, data, 2 ** n).map(Math.log10));
  const low = Math.floor(Math.min(...curves.flat()));
  const high = Math.ceil(Math.max(...curves.flat()));
  const x = (n) => BOX.left + (BOX.width * (n - FIRST)) / (LAST - FIRST);
  const y = (v) => BOX.top + (BOX.height * (high - v)) / (high - low);
  const path = (which, dash) => kit.svg("polyline", {
    points: lengths.map((n, i) => `${x(n)},${y(curves[i][which])}`).join(" "),
    fill: "none", style: `stroke:${kit.colours[which]}`, "stroke-width": 2.5, "stroke-dasharray": dash,
  });
  const here = curves[state.tokens - FIRST];
  const dot = (which) => kit.svg("circle", { cx: x(state.tokens), cy: y(here[which]), r: 5, style: `fill:${kit.colours[which]}` });
  const every = Math.max(1, Math.ceil((high - low) / 6));
  const ticks = [];
  for (let v = low; v <= high; v += every) {
    ticks.push(kit.svg("line", { x1: BOX.left, x2: BOX.left + BOX.width, y1: y(v), y2: y(v), stroke: "currentColor", opacity: 0.2 }));
    ticks.push(kit.svg("text", { x: BOX.left - 6, y: y(v) + 4, "font-size": font, "text-anchor": "end" }, `10${raised(v)}`));
  }
  const marks = lengths.filter((n) => n % (font > 13 ? 4 : 2) === 0).map((n) =>
    kit.svg("text", { x: x(n), y: BOX.top + BOX.height + 1.4 * font, "font-size": font, "text-anchor": "middle" }, n >= 10 ? `${2 ** (n - 10)}k` : String(2 ** n)),
  );
  const last = lengths.length - 1;
  const near = font - Math.abs(y(curves[last][0]) - y(curves[last][1]));
  const apart = Math.max(0, near / 2) * Math.sign(curves[last][0] - curves[last][1] || 1);
  const name = (which, label) => kit.svg("text", { x: BOX.left + BOX.width + 6, y: y(curves[last][which]) + 4 + apart * (2 * which - 1), "font-size": font }, label);
  return kit.picture(
    BOX.left + BOX.width + 5.2 * font, BOX.top + BOX.height + 2 * font, text,
    kit.svg("text", { x: 0, y: font, "font-size": font }, `${state.count === "memory" ? "bytes" : "operations"} of one head, over tokens; both axes logarithmic`),
    ticks, marks,
    kit.svg("line", { x1: x(state.tokens), x2: x(state.tokens), y1: BOX.top, y2: BOX.top + BOX.height, stroke: "currentColor", "stroke-dasharray": "2 3" }),
    path(0, ""), path(1, "8 4"), dot(0), dot(1), name(0, "softmax"), name(1, "linear"),
  );
}
