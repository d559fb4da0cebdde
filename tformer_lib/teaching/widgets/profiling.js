const PLOT = { left: 76, top: 28, width: 370, height: 210 };
const BAR = 270;
const KINDS = ["arithmetic", "memory", "launches"];

const FONT = window.innerWidth < 520 ? 16 : 14; // the picture shrinks to the width of a phone

function draw(root, data, kit) {
  const devices = Object.keys(data.devices);
  const works = Object.keys(data.works);
  const state = { device: devices[0], flops: 9, intensity: 0, launches: 7, factor: 2 };
  const figure = kit.el("div", {});
  const readout = kit.readout();
  const sliders = kit.el("div", {});
  let ready = false;
  const change = (part) => (value) => {
    state[part] = value;
    if (ready) show();
  };
  // A new piece of work moves the sliders, so they are made again.
  const begin = (name) => {
    const [flops, bytes, launches] = data.works[name];
    Object.assign(state, { flops: Math.log10(flops), intensity: Math.log2(flops / bytes), launches: Math.log2(launches) });
    sliders.replaceChildren(
      kit.controls(
        kit.slider({ label: "operations", min: 6, max: 15, step: 0.02, value: state.flops, format: (x) => short(10 ** x), change: change("flops") }),
        kit.slider({ label: "operations per byte", min: -4, max: 12, step: 0.02, value: state.intensity, format: (x) => short(2 ** x), change: change("intensity") }),
        kit.slider({ label: "operators launched", min: 0, max: 12, step: 0.02, value: state.launches, format: (x) => String(Math.round(2 ** x)), change: change("launches") }),
      ),
    );
    if (ready) show();
  };
  root.append(
    kit.controls(
      kit.select({ label: "device", options: devices, value: devices[0], change: change("device") }),
      kit.select({ label: "start from", options: works, value: works[0], change: begin }),
      kit.slider({ label: "make the slowest part faster", min: 1, max: 20, value: 2, format: (x) => `${x} times`, change: change("factor") }),
    ),
    sliders,
    figure,
    readout,
  );
  queueMicrotask(() => queueMicrotask(() => {
    ready = true;
    show();
  }));

  function show() {
    const found = work(state, data);
    const text = sentence(state, found);
    figure.replaceChildren(picture(state, found, text, kit));
    readout.textContent = text;
  }
}

// The three times, which decides, and what remains when that one gets faster.
function work(state, data) {
  const [rate, bandwidth, launch] = data.devices[state.device];
  const flops = 10 ** state.flops;
  const bytes = flops / 2 ** state.intensity;
  const times = [flops / rate, bytes / bandwidth, Math.round(2 ** state.launches) * launch];
  const longest = times.indexOf(Math.max(...times));
  const after = times.map((t, i) => (i === longest ? t / state.factor : t));
  return { rate, bandwidth, flops, times, longest, seconds: times[longest], after: Math.max(...after), next: after.indexOf(Math.max(...after)) };
}

function short(x) {
  if (x < 1000) return String(Number(x.toPrecision(x < 10 ? 2 : 3)));
  const names = ["", " thousand", " million", " billion", " trillion", "e15"];
  const step = Math.min(names.length - 1, Math.floor(Math.log10(x) / 3));
  return `${Number((x / 1000 ** step).toPrecision(3))}${names[step]}`;
}

function raised(x) {
  return [...String(x)].map((digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])).join("");
}

function duration(s) {
  const [size, unit] = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]].find(([size]) => s >= size) ?? [1e-9, "ns"];
  return `${Number((s / size).toPrecision(3))} ${unit}`;
}

const decide = (kind) => (KINDS[kind] === "launches" ? "decide" : "decides");

function sentence(state, found) {
  const name = KINDS[found.longest];
  const gain = found.seconds / found.after;
  const then = found.next === found.longest ? `${name} still ${decide(found.longest)}` : `then ${KINDS[found.next]} ${decide(found.next)}`;
  const share = (100 * found.times[0]) / found.seconds;
  const reached = share >= 99.95 ? "the whole matrix rate" : `${Number(share.toPrecision(2))} % of the matrix rate`;
  return `At least ${duration(found.seconds)}: ${name} ${decide(found.longest)}, and at best ${reached} is reached. ` +
    `With ${name} ${state.factor} times faster: ${Number(gain.toPrecision(3))} times faster in all, ${then}.`;
}

function picture(state, found, text, kit) {
  const low = -4;
  const high = 12;
  const top = Math.ceil(Math.log10(found.rate)) + 0.2;
  const bottom = top - 7;
  const x = (i) => PLOT.left + (PLOT.width * (i - low)) / (high - low);
  const y = (r) => PLOT.top + PLOT.height * Math.min(1, Math.max(0, (top - Math.log10(r)) / (top - bottom)));
  const roof = (i) => Math.min(found.rate, 2 ** i * found.bandwidth);
  const ridge = Math.log2(found.rate / found.bandwidth);
  const points = [low, Math.min(high, Math.max(low, ridge)), high].map((i) => `${x(i)},${y(roof(i))}`).join(" ");
  const here = Math.min(high, Math.max(low, state.intensity));
  const reached = found.flops / found.seconds;
  const note = (px, py, words, anchor = "middle") => kit.svg("text", { x: px, y: py, "font-size": FONT, "text-anchor": anchor }, words);
  const bars = KINDS.map((kind, i) => bar(kind, i, found, kit));
  const marks = [-4, 0, 4, 8, 12].map((i) => note(x(i), PLOT.top + PLOT.height + 16, i < 0 ? `1/${2 ** -i}` : (2 ** i).toLocaleString("en")));
  const levels = [1, 3, 5].map((down) => {
    const value = 10 ** (Math.floor(top) - down);
    return [kit.svg("line", { x1: PLOT.left, x2: PLOT.left + PLOT.width, y1: y(value), y2: y(value), stroke: "currentColor", opacity: 0.2 }),
      note(PLOT.left - 6, y(value) + 4, `10${raised(Math.floor(top) - down)}`, "end")];
  });
  return kit.picture(
    PLOT.left + PLOT.width + 40, PLOT.top + PLOT.height + 132, text,
    note(10, 16, "operations per second, over operations per byte", "start"),
    levels, marks,
    kit.svg("line", { x1: x(ridge), x2: x(ridge), y1: PLOT.top, y2: PLOT.top + PLOT.height, stroke: "currentColor", "stroke-dasharray": "2 4", opacity: 0.6 }),
    kit.svg("polyline", { points, fill: "none", style: `stroke:${kit.colours[0]}`, "stroke-width": 3 }),
    kit.svg("line", { x1: x(here), x2: x(here), y1: y(roof(here)), y2: y(reached), stroke: "currentColor", "stroke-dasharray": "2 3" }),
    kit.svg("circle", { cx: x(here), cy: y(reached), r: 6, style: `fill:${kit.colours[1]}` }),
    bars,
  );
}

// One of the three times as a bar on a logarithmic scale from 1 ns; the one that decides is filled.
function bar(kind, i, found, kit) {
  const top = PLOT.top + PLOT.height + 40 + 30 * i;
  const longest = Math.max(-2, Math.log10(found.seconds));
  const size = Math.max(0, (Math.log10(found.times[i]) + 9) / (longest + 9));
  const decides = i === found.longest;
  const colour = kit.colours[i];
  return [
    kit.svg("text", { x: PLOT.left + 14, y: top + 15, "font-size": FONT, "text-anchor": "end" }, kind),
    kit.svg("rect", { x: PLOT.left + 22, y: top, width: Math.max(1, BAR * size), height: 20, rx: 2, style: `stroke:${colour};fill:${decides ? colour : "none"}`, "stroke-width": 2 }),
    kit.svg("text", { x: PLOT.left + 30 + Math.max(1, BAR * size), y: top + 15, "font-size": FONT }, duration(found.times[i])),
  ];
}
