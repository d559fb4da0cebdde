// The sampler. data: shown, how many tokens have a bar of their own; places: [{name, words, logs}], logs = 100 log p of
// every token, from the likeliest on.

const [WIDTH, ROW, TOP, LEFT, SPAN] = [434, 29, 24, 96, 180];
const STEPS = { k: [0, 1, 2, 3, 5, 10, 20, 50, 100], p: 20, m: 20 };
const AXES = [0.1, 0.2, 0.4, 0.6, 0.8, 1];
const off = (text, value) => (value ? text : "off");

function draw(root, data, kit) {
  const state = { place: 0, heat: 10, k: 0, p: 0, m: 0, last: false, moved: null, drawn: null, dice: 1, axis: 0 };
  const stage = kit.el("div", {});
  const readout = kit.readout();
  const count = kit.el("p", { class: "tf-readout", "aria-live": "polite" });
  let ready = false; // the controls report their first value one by one; draw once all have
  const change = (part) => (value) => {
    state[part] = part === "place" ? Number(value) : value;
    if (part === "place") state.moved = null;
    state.drawn = null;
    state.axis = 0;
    if (ready) show();
  };
  const place = () => data.places[state.place];
  const logits = () => (state.moved ??= place().logs.map((log) => log / 100));
  const roll = (times) => {
    state.drawn = tally(rules(logits(), state), times, data.shown, state);
    show();
  };
  root.append(
    kit.controls(kit.select({ label: "the story so far ends with", options: data.places.map((p, i) => [i, p.name]), value: 0, change: change("place") })),
    kit.controls(
      kit.slider({ label: "temperature", min: 1, max: 30, value: 10, format: (v) => (v / 10).toFixed(1), change: change("heat") }),
      kit.slider({ label: "top-k", min: 0, max: STEPS.k.length - 1, value: 0, format: (v) => off(STEPS.k[v], v), change: change("k") }),
      kit.slider({ label: "top-p", min: 0, max: STEPS.p - 1, value: 0, format: (v) => off((1 - v / STEPS.p).toFixed(2), v), change: change("p") }),
      kit.slider({ label: "min-p", min: 0, max: STEPS.m, value: 0, format: (v) => off((v / STEPS.m).toFixed(2), v), change: change("m") }),
      kit.checkbox({ label: "temperature last", change: change("last") }),
    ),
    kit.controls(
      kit.button("Draw one", () => roll(1)),
      kit.button("Draw 1,000", () => roll(1000)),
      kit.button("Put the bars back", () => change("moved")(null)),
    ),
    stage,
    readout,
    count,
  );
  queueMicrotask(() => {
    ready = true;
    show();
  });

  // Give a token the share that the reader dragged its bar to; the others keep their proportions. The axis stays as it is
  // while the reader drags.
  function set(token, share, axis) {
    const wanted = Math.min(0.98, Math.max(0.001, share));
    const before = softmax(logits());
    const rest = 1 - before[token];
    state.moved = before.map((p, i) => Math.log(Math.max(i === token ? wanted : (p * (1 - wanted)) / rest, 1e-12)));
    state.drawn = null;
    state.axis = axis;
    show(token);
  }

  function show(focus) {
    const before = softmax(logits());
    const after = rules(logits(), state);
    stage.replaceChildren(bars(place(), before, after, state, data.shown, set, kit));
    if (focus !== undefined) stage.querySelectorAll("[role=slider]")[focus]?.focus({ preventScroll: true });
    readout.textContent = sentence(place(), after);
    count.textContent = counted(place(), after, state.drawn, data.shown);
  }
}

function softmax(logs, temperature = 1) {
  const top = Math.max(...logs);
  const powers = logs.map((log) => Math.exp((log - top) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

// What the library's distribution() does: temperature, then top-k, top-p and min-p; or the temperature last.
function rules(logs, state) {
  const heat = state.heat / 10;
  const p = softmax(logs, state.last ? 1 : heat);
  const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a] || a - b);
  const kept = new Array(p.length).fill(true);
  const renormalised = () => {
    const sum = p.reduce((total, x, i) => total + (kept[i] ? x : 0), 0);
    return p.map((x, i) => (kept[i] ? x / sum : 0));
  };
  if (state.k) {
    const least = p[order[Math.min(STEPS.k[state.k], p.length) - 1]];
    p.forEach((x, i) => (kept[i] &&= x >= least));
  }
  if (state.p) {
    const [now, enough] = [renormalised(), 1 - state.p / STEPS.p];
    let sum = 0;
    for (const i of order) {
      kept[i] &&= sum < enough;
      sum += now[i];
    }
  }
  if (state.m) p.forEach((x, i) => (kept[i] &&= x >= (state.m / STEPS.m) * p[order[0]]));
  if (!state.last) return renormalised();
  const chosen = logs.map((log, i) => (kept[i] ? log : -Infinity));
  return softmax(chosen, heat);
}

// Random numbers that are the same on every machine (mulberry32).
function random(state) {
  state.dice = (state.dice + 0x6d2b79f5) | 0;
  let t = Math.imul(state.dice ^ (state.dice >>> 15), 1 | state.dice);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
}

// How often each of the shown tokens, and all others together, come in so many draws.
function tally(p, times, shown, state) {
  const counts = new Array(shown + 1).fill(0);
  for (let n = 0; n < times; n++) {
    let [u, token] = [random(state), 0];
    while (token < p.length - 1 && u >= p[token]) u -= p[token++];
    counts[Math.min(token, shown)]++;
  }
  return { counts, times };
}

const sum = (p) => p.reduce((a, b) => a + b, 0);
const grouped = (p, shown) => [...p.slice(0, shown), sum(p.slice(shown))];
const dotted = (word) => word.replace(/^ /, "·");

function bars(place, before, after, { drawn, axis }, shown, set, kit) {
  const [model, now] = [grouped(before, shown), grouped(after, shown)];
  const end = axis || AXES.find((x) => x >= Math.max(...model, ...now)) || 1; // the probability at the end of the axis
  const scale = SPAN / end;
  const length = (p) => Math.min(SPAN, p * scale);
  const parts = [
    kit.svg("text", { x: LEFT + SPAN + 8, y: 13, "font-size": 13.5, style: "fill:var(--tf-muted)" }, "model"),
    kit.svg("text", { x: LEFT + SPAN + 57, y: 13, "font-size": 13.5, "font-weight": 600, style: "fill:var(--tf-blue)" }, "drawn with"),
  ];
  now.forEach((p, i) => {
    const y = TOP + ROW * i;
    const other = i === shown;
    const name = other ? `${(before.length - shown).toLocaleString("en")} others` : dotted(place.words[i]);
    const cut = p === 0;
    parts.push(
      kit.svg("text", { x: LEFT - 8, y: y + 15, "font-size": 13.5, "text-anchor": "end", "text-decoration": cut ? "line-through" : false, style: other ? "fill:var(--tf-muted)" : "" }, name),
      kit.svg("rect", { x: LEFT, y: y + 3, width: Math.max(1, length(model[i])), height: 6, rx: 2, style: "fill:var(--tf-line)" }),
      kit.svg("rect", { x: LEFT, y: y + 11, width: length(p), height: 10, rx: 2, style: "fill:var(--tf-blue)" }),
      kit.svg("text", { x: LEFT + SPAN + 8, y: y + 15, "font-size": 13.5, style: "fill:var(--tf-muted)" }, model[i].toFixed(3)),
      kit.svg("text", { x: LEFT + SPAN + 57, y: y + 15, "font-size": 13.5, "font-weight": 600 }, cut ? "cut" : p.toFixed(3)),
    );
    if (drawn) {
      const share = drawn.counts[i] / drawn.times;
      parts.push(
        kit.svg("circle", { cx: LEFT + length(share), cy: y + 16, r: 4.5, style: "fill:var(--tf-vermilion)" }),
        kit.svg("text", { x: WIDTH - 2, y: y + 15, "font-size": 13.5, "text-anchor": "end", style: "fill:color-mix(in srgb, var(--tf-vermilion) 75%, var(--tf-ink))" }, `${drawn.counts[i]}`),
      );
    }
    if (!other) parts.push(handle(i, name, model[i], end, y, set, kit));
  });
  const picture = kit.picture(WIDTH, TOP + ROW * now.length + 6, `Probabilities of the ${shown} likeliest tokens and of all others: the model's, and those that the token is drawn with`, parts);
  picture.setAttribute("role", "group"); // it holds sliders, which an image may not
  return picture;
}

// The end of a bar, which is dragged with the pointer or moved with the arrow keys.
function handle(token, name, share, end, y, set, kit) {
  const grip = kit.svg("rect", {
    x: LEFT + Math.min(SPAN, (share * SPAN) / end) - 5, y: y + 1, width: 10, height: 10, rx: 5, tabindex: 0, role: "slider",
    "aria-label": `probability that the model gives to ${name}`, "aria-valuemin": 0, "aria-valuemax": 1,
    "aria-valuenow": share.toFixed(3), style: "fill:var(--tf-ink);stroke:transparent;stroke-width:12px;cursor:ew-resize;touch-action:none" /* the stroke is there to be hit */,
    onkeydown: (event) => {
      const step = { ArrowRight: 0.01, ArrowUp: 0.01, ArrowLeft: -0.01, ArrowDown: -0.01 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      set(token, share + step, 0);
    },
    onpointerdown: (event) => {
      event.preventDefault();
      const picture = grip.ownerSVGElement;
      const inch = WIDTH / picture.getBoundingClientRect().width; // units of the picture in a pixel
      const from = event.clientX;
      const move = (e) => set(token, share + ((e.clientX - from) * inch * end) / SPAN, end);
      const stop = () => {
        window.removeEventListener("pointermove", move);
        window.removeEventListener("pointerup", stop);
        window.removeEventListener("pointercancel", stop);
      };
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", stop);
      window.addEventListener("pointercancel", stop);
    },
  });
  return grip;
}

function sentence(place, after) {
  const kept = after.filter((p) => p > 0).length;
  const entropy = after.reduce((total, p) => total - (p > 0 ? p * Math.log(p) : 0), 0);
  const best = after.indexOf(Math.max(...after));
  return `${kept.toLocaleString("en")} of ${after.length.toLocaleString("en")} tokens can be drawn. The likeliest is “${(place.words[best] ?? "another").trim()}” with ${after[best].toFixed(3)}. The entropy is ${entropy.toFixed(2)} nats.`;
}

function counted(place, after, drawn, shown) {
  if (!drawn) return "";
  const first = drawn.counts.findIndex((c) => c > 0);
  if (drawn.times === 1) return `Drawn: “${first < shown ? place.words[first].trim() : "one of the others"}”.`;
  const p = grouped(after, shown)[0];
  const [mean, deviation] = [drawn.times * p, Math.sqrt(drawn.times * p * (1 - p))];
  return `“${place.words[0].trim()}” came ${drawn.counts[0]} times in ${drawn.times.toLocaleString("en")} draws; expected are ${mean.toFixed(0)}, with a standard deviation of ${deviation.toFixed(0)}.`;
}
