// The common kit of the interactive figures. No framework: each helper returns a plain DOM element.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null));
  return node;
}

let serial = 0;
const uid = (stem) => `tf-${stem}-${Date.now().toString(36)}-${serial++}`;

const kit = {
  // The six colours of the course, as CSS variables that follow the theme.
  colours: ["var(--tf-blue)", "var(--tf-vermilion)", "var(--tf-green)", "var(--tf-orange)", "var(--tf-purple)", "var(--tf-sky)"],

  // el("p", {class: "x"}, "text", child, [more])
  el: (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children),

  // The same for SVG elements: svg("rect", {x: 0, y: 0, width: 10, height: 10})
  svg: (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children),

  // An <svg> that scales with the page; the label is its text alternative.
  picture: (width, height, label, ...children) =>
    kit.svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "tf-picture", style: `max-width:${width}px` }, ...children),

  // Background for a share between 0 and 1 (attention weights, probabilities).
  shade: (share, colour = "var(--tf-blue)") => `color-mix(in srgb, ${colour} ${Math.round(100 * Math.min(1, Math.max(0, share)))}%, var(--tf-surface))`,

  // A row of controls, wrapped on a narrow screen.
  controls: (...children) => kit.el("div", { class: "tf-controls" }, ...children),

  // A labelled slider. change(value) is called at once and whenever it moves.
  slider({ label, min, max, step = 1, value, format = String, change }) {
    const id = uid("slider");
    const shown = kit.el("output", { for: id, "aria-live": "off" }); // the slider itself tells its value
    const input = kit.el("input", { type: "range", id, min, max, step, value });
    const update = () => {
      shown.textContent = format(Number(input.value));
      input.setAttribute("aria-valuetext", shown.textContent);
      change(Number(input.value));
    };
    input.addEventListener("input", update);
    queueMicrotask(update);
    return kit.el("div", { class: "tf-control" }, kit.el("label", { for: id }, label, " "), input, shown);
  },

  // A labelled menu. options: [[value, text], ...] or [text, ...]; change(value) is called at once and on change.
  select({ label, options, value, change }) {
    const id = uid("select");
    const items = options.map((o) => (Array.isArray(o) ? o : [o, o]));
    const input = kit.el("select", { id }, items.map(([v, text]) => kit.el("option", { value: v, selected: String(v) === String(value) }, text)));
    input.addEventListener("change", () => change(input.value));
    queueMicrotask(() => change(input.value));
    return kit.el("div", { class: "tf-control" }, kit.el("label", { for: id }, label, " "), input);
  },

  // A labelled checkbox. change(checked) is called at once and on change.
  checkbox({ label, value = false, change }) {
    const id = uid("checkbox");
    const input = kit.el("input", { type: "checkbox", id, checked: value });
    input.addEventListener("change", () => change(input.checked));
    queueMicrotask(() => change(input.checked));
    return kit.el("div", { class: "tf-control" }, input, kit.el("label", { for: id }, " ", label));
  },

  button: (label, press) => kit.el("button", { type: "button", class: "tf-button", onclick: press }, label),

  // Back / next buttons for figures that go step by step; change(step) is called at once and on each move. At either end
  // a button is only said to be disabled, for one that is disabled loses the focus, and the arrow keys with it.
  stepper({ steps, change, name = "step" }) {
    let step = 0;
    const where = kit.el("output", { class: "tf-where", "aria-live": "polite" });
    const move = (to) => {
      step = Math.min(steps - 1, Math.max(0, to));
      where.textContent = `${name} ${step + 1} of ${steps}`;
      back.setAttribute("aria-disabled", step === 0);
      next.setAttribute("aria-disabled", step === steps - 1);
      change(step);
    };
    const back = kit.button("Back", () => move(step - 1));
    const next = kit.button("Next", () => move(step + 1));
    const first = kit.button("Start again", () => move(0));
    const bar = kit.el("div", { class: "tf-stepper", role: "group", "aria-label": `${name}s` }, back, next, first, where);
    bar.addEventListener("keydown", (event) => {
      const go = { ArrowRight: step + 1, ArrowLeft: step - 1, Home: 0, End: steps - 1 }[event.key];
      if (go === undefined) return;
      event.preventDefault();
      move(go);
    });
    queueMicrotask(() => move(0));
    return bar;
  },

  // A line of text that a screen reader announces when it changes: set its textContent.
  readout: () => kit.el("p", { class: "tf-readout", "aria-live": "polite" }),
};

// Wrap the chapter's draw(root, data, kit) for anywidget: a labelled figure that is drawn anew when its data changes.
function renderWith(draw) {
  return ({ model, el }) => {
    const heading = kit.el("p", { class: "tf-label", id: uid("label") }, model.get("label"));
    const root = kit.el("div", { class: "tf-body" });
    const figure = kit.el("div", { class: "tf-widget", role: "group", "aria-labelledby": heading.id }, heading, root);
    const again = () => {
      root.replaceChildren();
      draw(root, model.get("data"), kit);
    };
    el.append(figure);
    again();
    model.on("change:data", again);
    return () => model.off("change:data", again);
  };
}
