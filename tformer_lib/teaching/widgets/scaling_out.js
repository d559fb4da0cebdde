const WIDTH = 440; // narrow enough that its letters can be read on a phone
const LEFT = 10;
const WIDE = 320;
const ROW = 72;
const PARTS = ["weights", "gradients", "optimizer", "activations"];

function draw(root, data, kit) {
  const state = { model: Math.min(1, data.models.length - 1), link: 0, devices: Math.min(6, data.devices.length - 1) };
  const figure = kit.el("div", {});
  const readout = kit.readout();
  let ready = false;
  const change = (part) => (value) => {
    state[part] = value;
    if (ready) show();
  };
  root.append(
    kit.controls(
      kit.select({ label: "model", options: data.models.map((name, i) => [i, name]), value: state.model, change: change("model") }),
      kit.select({ label: "links", options: data.links.map((name, i) => [i, name]), value: state.link, change: change("link") }),
      kit.slider({ label: "devices", min: 0, max: data.devices.length - 1, value: state.devices, format: (i) => data.devices[i].toLocaleString("en"), change: change("devices") }),
    ),
    figure,
    readout,
  );
  queueMicrotask(() => queueMicrotask(() => {
    ready = true;
    show();
  }));

  function show() {
    const plans = data.plans[state.model][state.link][state.devices];
    const text = sentence(state, plans, data);
    figure.replaceChildren(picture(state, plans, text, data, kit));
    readout.textContent = text;
  }
}

const held = (plan) => plan[0] + plan[1] + plan[2] + plan[3];
const takes = (plan) => plan[4] + plan[5];
const short = (x) => Number(x.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 });

function sentence(state, plans, data) {
  const devices = data.devices[state.devices];
  const fitting = plans.map((plan, i) => [plan, data.schemes[i]]).filter(([plan]) => plan[7] > 0);
  const start = `${data.models[state.model]} on ${devices.toLocaleString("en")} ${devices === 1 ? "device" : "devices"}: `;
  if (!fitting.length) return `${start}no scheme fits into ${short(data.memory[state.link])} GB.`;
  const [best, name] = fitting.reduce((a, b) => (takes(b[0]) < takes(a[0]) ? b : a));
  const share = Math.round((100 * best[4]) / takes(best));
  return `${start}the fastest that fits is ${name}, with ${short(takes(best))} s a step, ${short(data.tokens / takes(best))} tokens a second, and arithmetic in ${share} % of the time.`;
}

function picture(state, plans, text, data, kit) {
  const memory = data.memory[state.link];
  const most = Math.max(memory * 1.25, Math.min(memory * 3, Math.max(...plans.map(held))));
  const slowest = Math.max(...plans.filter((plan) => plan[7] > 0).map(takes), 1e-9);
  const note = (x, y, words, anchor = "start") => kit.svg("text", { x, y, "font-size": 14, "text-anchor": anchor }, words);
  const rows = plans.map((plan, i) => row(plan, i, data, { most, slowest }, note, kit));
  const bottom = 30 + ROW * plans.length;
  const limit = LEFT + (WIDE * memory) / most;
  const keys = PARTS.map((part, i) => [
    kit.svg("rect", { x: 10 + 106 * i, y: bottom + 8, width: 12, height: 12, style: `fill:${kit.colours[i]}` }),
    note(26 + 106 * i, bottom + 19, part),
  ]);
  const times = [
    kit.svg("rect", { x: 10, y: bottom + 33, width: 12, height: 8, style: "fill:currentColor", opacity: 0.65 }),
    note(26, bottom + 42, "time: arithmetic"),
    kit.svg("rect", { x: 168, y: bottom + 33, width: 12, height: 8, fill: "none", stroke: "currentColor" }),
    note(186, bottom + 42, "time: waiting for other devices"),
  ];
  return kit.picture(
    WIDTH, bottom + 52, text,
    plans.map((_, i) => kit.svg("line", { x1: limit, x2: limit, y1: 40 + ROW * i, y2: 70 + ROW * i, stroke: "currentColor", "stroke-dasharray": "4 3" })),
    note(limit, 14, `${short(memory)} GB`, "middle"),
    rows, keys, times,
  );
}

// One scheme: its name and its time, a bar of what it holds, and below it a thin bar of its time.
function row(plan, i, data, scale, note, kit) {
  const top = 44 + ROW * i;
  let left = LEFT;
  const bars = PARTS.map((part, p) => {
    const width = Math.max(0, Math.min((WIDE * plan[p]) / scale.most, LEFT + WIDE - left));
    const bar = kit.svg("rect", { x: left, y: top, width, height: 20, style: `fill:${kit.colours[p]}` });
    left += width;
    return bar;
  });
  const fits = plan[7] > 0;
  const beyond = held(plan) > scale.most ? " …" : "";
  const busy = fits ? (WIDE * plan[4]) / scale.slowest : 0;
  const idle = fits ? (WIDE * plan[5]) / scale.slowest : 0;
  const pieces = plan[7] > 1 ? ` in ${plan[7]} micro-batches` : "";
  return [
    note(LEFT, top - 7, data.schemes[i]),
    note(WIDTH - 10, top - 7, fits ? `${short(takes(plan))} s${pieces}` : "does not fit", "end"),
    bars,
    note(left + 6, top + 15, `${short(held(plan))} GB${beyond}`),
    kit.svg("rect", { x: LEFT, y: top + 25, width: Math.max(0, busy), height: 9, style: "fill:currentColor", opacity: 0.65 }),
    kit.svg("rect", { x: LEFT + busy, y: top + 25, width: Math.max(0, idle), height: 9, fill: "none", stroke: "currentColor" }),
  ];
}
