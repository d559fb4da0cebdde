const LEFT = 160;
const WIDE = 300;
const ROW = 64;
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
const short = (x) => (x >= 1000 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(3))));

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
  const note = (x, y, words, anchor = "start") => kit.svg("text", { x, y, "font-size": 13, "text-anchor": anchor }, words);
  const rows = plans.map((plan, i) => row(plan, i, data, { most, slowest, memory }, note, kit));
  const bottom = 52 + ROW * plans.length;
  const limit = LEFT + (WIDE * memory) / most;
  const keys = PARTS.map((part, i) => [
    kit.svg("rect", { x: 10 + 112 * i, y: bottom + 8, width: 12, height: 12, style: `fill:${kit.colours[i]}` }),
    note(27 + 112 * i, bottom + 19, part),
  ]);
  const times = [
    kit.svg("rect", { x: 10, y: bottom + 30, width: 12, height: 8, style: "fill:currentColor", opacity: 0.65 }),
    note(27, bottom + 39, "time: arithmetic"),
    kit.svg("rect", { x: 160, y: bottom + 30, width: 12, height: 8, fill: "none", stroke: "currentColor" }),
    note(177, bottom + 39, "time: waiting for other devices"),
  ];
  return kit.picture(
    LEFT + WIDE + 190, bottom + 50, text,
    note(10, 16, "memory and time of a step, for each device"),
    kit.svg("line", { x1: limit, x2: limit, y1: 40, y2: bottom - 6, stroke: "currentColor", "stroke-dasharray": "4 3" }),
    note(limit, 36, `${short(memory)} GB`, "middle"),
    rows, keys, times,
  );
}

// One scheme: its name, a bar of what it holds, and below it a thin bar of its time.
function row(plan, i, data, scale, note, kit) {
  const top = 48 + ROW * i;
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
  return [
    note(10, top + 15, data.schemes[i].replace("tensor parallel", "tensor p.")),
    bars,
    note(left + 6, top + 15, `${short(held(plan))} GB${beyond}`),
    kit.svg("rect", { x: LEFT, y: top + 26, width: Math.max(0, busy), height: 9, style: "fill:currentColor", opacity: 0.65 }),
    kit.svg("rect", { x: LEFT + busy, y: top + 26, width: Math.max(0, idle), height: 9, fill: "none", stroke: "currentColor" }),
    note(LEFT + busy + idle + 6, top + 36, fits ? `${short(takes(plan))} s${plan[7] > 1 ? `, ${plan[7]} micro-batches` : ""}` : "does not fit"),
  ];
}
