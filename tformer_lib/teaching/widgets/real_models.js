// A chat with a model that runs in the notebook's kernel. Python owns the conversation; this shows it and asks for more.

// The conversation: each turn's text, its answer, and what it took.
function transcript(data, kit) {
  return data.turns.map((turn) => {
    const answer = kit.el("p", { class: "tf-said" }, turn.answer || "…");
    const took = kit.el("p", { class: "tf-took" }, turn.took);
    return kit.el("div", {}, kit.el("p", { class: "tf-said tf-mine" }, turn.said || "(go on)"), answer, took);
  });
}

// Where the chosen head looks from each token of the last answer: a slider walks through the answer.
function attention(data, kit) {
  const look = data.look;
  if (!look) return kit.el("p", { class: "tf-took" }, data.why);
  const words = look.words.map((word) => kit.el("span", { class: "tf-word" }, word));
  const told = kit.readout();
  const change = (place) => {
    const weights = look.rows[place];
    const asks = look.start + place;
    words.forEach((word, i) => {
      word.style.background = i < weights.length ? kit.shade(0.45 * weights[i]) : "transparent";
      word.style.opacity = i > asks ? 0.7 : 1;
      word.style.outline = i === asks ? "2px solid var(--tf-vermilion)" : "none";
    });
    const best = weights.indexOf(Math.max(...weights));
    told.textContent = `“${look.words[asks].trim()}” looks most at “${look.words[best].trim()}” (${Math.round(100 * weights[best])} %)`;
  };
  const steps = look.rows.length;
  const slider = kit.slider({ label: "Token of the answer", min: 0, max: steps - 1, value: steps - 1, format: (i) => `${i + 1} of ${steps}`, change });
  return [slider, kit.el("p", { class: "tf-text" }, words), told];
}

function renderChat({ model, el }) {
  const heading = kit.el("p", { class: "tf-label", id: uid("label") }, model.get("label"));
  const talk = kit.el("div", { role: "log", "aria-live": "polite", "aria-label": "The conversation" });
  const looks = kit.el("div", {});
  const note = kit.readout();
  const id = uid("say");
  const box = kit.el("textarea", { id, rows: 2, disabled: true });
  const ask = (what) => model.send(what);
  const say = () => {
    ask({ do: "say", text: box.value });
    box.value = "";
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      say();
    }
  });
  const buttons = {
    say: kit.button("Send", say),
    stop: kit.button("Stop", () => ask({ do: "stop" })),
    again: kit.button("Another answer", () => ask({ do: "again" })),
    new: kit.button("New conversation", () => ask({ do: "new" })),
  };
  const start = model.get("data");
  let settled = false; // the controls call their change when they are made, which asks for nothing
  const set = (what) => settled && ask(what);
  const temperature = kit.slider({
    label: "Temperature", min: 0, max: 1.5, step: 0.1, value: start.temperature, format: (t) => t.toFixed(1),
    change: (t) => set({ do: "set", temperature: t }),
  });
  const heads = kit.select({
    label: "Head", value: `${start.layer}.${start.head}`,
    options: start.heads.map(([layer, head]) => [`${layer}.${head}`, `layer ${layer}, head ${head}`]),
    change: (place) => set({ do: "look", place: place.split(".").map(Number) }),
  });
  queueMicrotask(() => queueMicrotask(() => (settled = true)));
  const live = [box, temperature.querySelector("input"), heads.querySelector("select"), ...Object.values(buttons)];
  let here = false;
  const show = () => {
    const data = model.get("data");
    talk.replaceChildren(...transcript(data, kit));
    looks.replaceChildren(...[attention(data, kit)].flat());
    note.textContent = here ? data.note : "Run this cell in JupyterLab to chat: the model answers from a running kernel.";
    live.forEach((part) => (part.disabled = !here));
    if (here) {
      const idle = [buttons.say, buttons.again, buttons.new];
      idle.forEach((button) => (button.disabled = data.busy));
      buttons.stop.disabled = !data.busy;
    }
  };
  const hear = (message) => {
    here = here || message === "here";
    show();
  };
  const body = kit.el(
    "div", { class: "tf-body" }, talk,
    kit.el("label", { for: id }, "Your turn"), box, kit.controls(Object.values(buttons), temperature), note,
    kit.el("p", { class: "tf-label" }, "Where a head looks while it writes the last answer"), kit.controls(heads), looks,
  );
  el.append(kit.el("div", { class: "tf-widget tf-chat", role: "group", "aria-labelledby": heading.id }, heading, body));
  show();
  model.on("change:data", show);
  model.on("msg:custom", hear);
  ask({ do: "hello" });
  return () => {
    model.off("change:data", show);
    model.off("msg:custom", hear);
  };
}
