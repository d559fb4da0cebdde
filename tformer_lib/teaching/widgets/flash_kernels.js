// The bank explorer.

// data: {groups, layouts, widths, places: {d: {layout: place of [row][chunk], in pieces of 16 bytes}}}
function draw(root, data, kit) {
  const [names, layouts] = [data.widths, data.layouts];
  const state = { d: names[0], layout: layouts[0], chunk: 3 };
  const said = kit.readout();
  const picture = kit.el("div", {});
  const show = () => {
    const places = data.places[state.d][state.layout];
    const chunk = Math.min(state.chunk, places[0].length - 1);
    const groups = places.map((row) => row[chunk] % data.groups);
    const hits = Array.from({ length: data.groups }, (_, g) => groups.filter((x) => x === g).length);
    const turns = Math.max(...hits);
    said.textContent = `Piece ${chunk} of rows 0 to ${places.length - 1} lies in bank groups ${groups.join(", ")}: ${turns} turn${turns > 1 ? "s" : ""}.`;
    picture.replaceChildren(memory(places, chunk, hits, data.groups, kit));
  };
  const chunks = data.places[names[0]][layouts[0]][0].length;
  root.append(
    kit.controls(
      kit.select({ label: "Layout", options: layouts, value: state.layout, change: (v) => ((state.layout = v), show()) }),
      kit.select({ label: "head_dim", options: names, value: state.d, change: (v) => ((state.d = v), show()) }),
      kit.slider({ label: "Piece", min: 0, max: chunks - 1, value: state.chunk, change: (v) => ((state.chunk = v), show()) }),
    ),
    said,
    picture,
  );
}

// Shared memory, a line for every 128 bytes. Each cell says row.piece; the pieces that are read are filled.
function memory(places, chunk, hits, groups, kit) {
  const [left, top, width, height] = [2, 44, 42, 22];
  const lines = Math.floor(Math.max(...places.flat()) / groups) + 1;
  const cells = places.flatMap((row, r) => row.map((place, c) => {
    const [line, group] = [Math.floor(place / groups), place % groups];
    const read = c === chunk;
    const colour = hits[group] > 1 ? "var(--tf-vermilion)" : "var(--tf-blue)";
    return kit.svg("g", {},
      kit.svg("rect", { x: left + width * group, y: top + height * line, width, height, "stroke-width": read ? 2 : 1, style: `fill:${read ? kit.shade(0.4, colour) : "none"};stroke:${read ? colour : "var(--tf-line)"}` }),
      kit.svg("text", { x: left + width * (group + 0.5), y: top + height * line + 15, "text-anchor": "middle", "font-size": 12, "font-weight": read ? 700 : 400, opacity: read ? 1 : 0.75 }, `${r}.${c}`),
    );
  }));
  const heads = hits.map((count, g) => kit.svg("text", { x: left + width * (g + 0.5), y: top - 8, "text-anchor": "middle", "font-size": 12 }, `${4 * g}–${4 * g + 3}`));
  const counts = hits.map((count, g) => kit.svg("text", { x: left + width * (g + 0.5), y: top + height * lines + 18, "text-anchor": "middle", "font-size": 13, "font-weight": count > 1 ? 700 : 400 }, count ? `${count} ×` : "·"));
  return kit.picture(left + width * groups + 4, top + height * lines + 26, `Shared memory in lines of 128 bytes; reads of each bank group: ${hits.join(", ")}`,
    kit.svg("text", { x: left, y: 15, "font-size": 12 }, "banks (cells: row.piece; filled: read now)"), heads, cells, counts);
}
