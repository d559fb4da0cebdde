// A long name, in code or alone in a cell, breaks behind a full stop, an underscore or a slash, or before a capital letter,
// and the space before a token stays beside it, as the dashes of an option do. On a phone a table that fits is not
// moved sideways, and a comment is not either: it goes on below its beginning. What is moved, such as a table, a figure
// or a listing, shows that it goes on. On a desktop a comment behind code that has no room there takes the next line.
(() => {
  const PHONE = 600; // pixels, as in custom.css
  const DESKTOP = 1200; // pixels, as in custom.css: from here on no code scrolls
  const TALLEST = 9; // lines of a row: what would be taller is moved sideways instead
  const BEHIND = /(?<=[\p{L}\d)][._/]+)(?<!\d\.(?=\d))(?=[\p{L}\d(])|(?<=\p{Ll}{3})(?=\p{Lu}\p{Ll})/u;
  const NARROWEST = 80; // pixels that a comment needs beside its code
  const SMALLER = 0.88; // of a printed line's size, as in custom.css
  const NAMES = 0.4; // of the screen: a first column of at most this width stays while the others are moved
  const WHOLE = 12; // letters: a name in that column that has no more of them is not broken
  const DEEPEST = 20; // letters: what is broken off a printed line is indented by no more of them

  const breaks = () => {
    const words = (element) => {
      const walk = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
      const texts = [];
      while (walk.nextNode()) texts.push(walk.currentNode);
      for (const text of texts) {
        const parts = text.data.split(BEHIND);
        if (parts.length === 1) continue;
        text.replaceWith(...parts.flatMap((part) => [document.createElement("wbr"), part]).slice(1));
      }
    };
    for (const code of document.querySelectorAll("article code:not(pre code)")) {
      const table = code.closest("table");
      const isNarrow = table && (window.innerWidth <= PHONE || table.scrollWidth > table.parentElement.clientWidth + 1);
      if (code.textContent.length > (isNarrow ? 12 : 28)) words(code); // the others have room in a line
      if (/^['"]? \S+$/.test(code.textContent)) code.classList.add("tf-token");
      for (const word of code.querySelectorAll(".pre")) {
        if (/^--?[\w-]{1,24}$/.test(word.textContent)) word.classList.add("tf-token");
      }
    }
    for (const cell of document.querySelectorAll("article :is(td, th), article .tf-of")) {
      const isName = /^\S{16,}$/.test(cell.textContent.trim()) || cell.matches(".tf-of");
      if (!cell.childElementCount && isName) words(cell);
    }
  };

  const inside = (roots, selector) => [...new Set(roots.flatMap((root) => [...root.querySelectorAll(selector)]))];

  const tables = (roots) => {
    const all = inside(roots, "table").filter((table) => table.parentElement.clientWidth);
    const phone = window.innerWidth <= PHONE;
    const fits = (table) => {
      const line = parseFloat(getComputedStyle(table).lineHeight);
      const tallest = Math.max(...[...table.rows].map((row) => row.clientHeight));
      return table.scrollWidth <= table.parentElement.clientWidth + 1 && tallest <= TALLEST * line;
    };
    for (const table of all) {
      table.classList.toggle("tf-fits", phone);
      table.classList.remove("tf-close", "tf-named");
    }
    if (!phone) return;
    const wide = all.filter((table) => !fits(table)); // all measured before any is changed: one layout, not one each
    for (const table of wide) table.classList.add("tf-close");
    const moved = wide.filter((table) => !fits(table));
    for (const table of moved) table.classList.remove("tf-fits", "tf-close");
    const named = moved.filter((table) => {
      const room = table.parentElement.clientWidth;
      return table.scrollWidth > room + 1 && table.rows[0].cells[0].offsetWidth <= NAMES * room;
    });
    for (const table of named) {
      table.classList.add("tf-named");
      for (const { cells: [name] } of table.rows) name.classList.toggle("tf-whole", name.textContent.trim().length <= WHOLE);
    }
  };

  // The right edge fades while there is more to the right of it.
  const mark = (box) => box.classList.toggle("tf-more", box.scrollWidth - box.clientWidth - box.scrollLeft > 2);
  const edges = (roots) => {
    const boxes = inside(roots, "*:has(> table), .tf-scroll, .cell_output:has(img), .highlight pre, .tf-table pre");
    const wide = boxes.filter((box) => box.classList.contains("tf-more") || box.scrollWidth > box.clientWidth + 2);
    for (const box of wide) {
      mark(box);
      box.onscroll = () => mark(box);
    }
  };

  const isBehindCode = (comment) => {
    let before = "";
    for (let node = comment.previousSibling; node && !before.includes("\n"); node = node.previousSibling) {
      before = node.textContent + before;
    }
    return /\S/.test(before.slice(before.lastIndexOf("\n") + 1));
  };
  const comments = (roots) => {
    const all = inside(roots, ".highlight pre :is(.c1, .sd, .ch, .cp)")
      .filter((one) => !one.textContent.includes("\n"));
    for (const one of all) one.classList.remove("tf-comment");
    if (window.innerWidth >= DESKTOP) {
      const broken = all.filter((one) => one.matches(".c1") && one.getClientRects().length > 1 && isBehindCode(one));
      for (const one of broken) {
        one.classList.add("tf-comment");
        one.style.maxWidth = "calc(100% - 12ch)"; // the indent of the lines that go on, as in custom.css
      }
    }
    if (window.innerWidth > PHONE) return;
    const rooms = all.map((one) => {
      const pre = one.closest("pre");
      const start = pre.getBoundingClientRect().left + parseFloat(getComputedStyle(pre).paddingLeft);
      const left = one.getBoundingClientRect().left + pre.scrollLeft - start;
      return pre.clientWidth - 2 * parseFloat(getComputedStyle(pre).paddingLeft) - left;
    });
    all.forEach((one, i) => {
      if (rooms[i] < NARROWEST) return;
      one.classList.add("tf-comment");
      one.style.maxWidth = `${Math.floor(rooms[i])}px`;
      const indent = one.textContent.search(/\S/); // of a line in the middle of a docstring
      if (indent > 0) one.style.paddingLeft = `${indent}ch`;
      if (indent > 0) one.style.textIndent = `${-indent}ch`;
    });
  };

  // What is broken off a printed line is indented, so that it does not look like a line of its own.
  const indent = (pre) => {
    if (pre.querySelector(".tf-line") || [...pre.children].some((part) => part.textContent.includes("\n"))) return;
    const lines = [document.createElement("span")];
    for (const node of [...pre.childNodes]) {
      const parts = node.nodeType === Node.TEXT_NODE ? node.data.split(/(?<=\n)/) : [node];
      for (const part of parts) {
        lines.at(-1).append(part);
        if (typeof part === "string" && part.endsWith("\n")) lines.push(document.createElement("span"));
      }
    }
    for (const line of lines) {
      line.className = "tf-line";
      const deep = Math.max(line.textContent.search(/\S/), 0) + 2;
      line.style.setProperty("--tf-deep", `${Math.min(deep, DEEPEST)}ch`);
    }
    pre.replaceChildren(...lines.filter((line) => line.textContent));
  };

  // Printed lines that are a few characters too long for a phone are set smaller rather than broken.
  const pen = document.createElement("canvas").getContext("2d");
  const prints = (roots) => {
    for (const output of inside(roots, ".output.stream:not(.tf-table)")) {
      output.classList.remove("tf-small");
      const pre = output.querySelector("pre");
      if (window.innerWidth > PHONE || !pre || !pre.clientWidth) continue;
      const look = getComputedStyle(pre);
      pen.font = `${look.fontSize} ${look.fontFamily}`;
      const longest = Math.max(...pre.textContent.split("\n").map((line) => [...line.trimEnd()].length));
      const width = longest * pen.measureText("0").width;
      const room = pre.clientWidth - parseFloat(look.paddingLeft) - parseFloat(look.paddingRight);
      output.classList.toggle("tf-small", width > room && SMALLER * width <= room);
      if (SMALLER * width > room) indent(pre);
    }
  };

  const fit = (roots) => {
    tables(roots);
    prints(roots);
    comments(roots);
    edges(roots);
  };
  const whole = () => fit([...document.querySelectorAll("article")]);

  const opened = new Set(); // folds that were opened since the last frame: what is in them had no width before
  const unfold = ({ target }) => {
    if (!target.open) return;
    if (!opened.size) {
      requestAnimationFrame(() => {
        const roots = [...opened];
        opened.clear();
        fit(roots);
      });
    }
    opened.add(target);
  };
  document.addEventListener("DOMContentLoaded", () => {
    breaks();
    whole();
  });
  window.addEventListener("load", () => {
    whole();
    window.MathJax?.startup?.promise?.then(whole);
  });
  let resized;
  window.addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(whole, 100); // once the styles of the new width hold
  });
  document.addEventListener("toggle", unfold, true);
  document.addEventListener("click", ({ target }) => {
    const box = target.closest(".admonition.toggle"); // folded by another program, which tells nobody
    if (box && target.closest(".admonition-title")) requestAnimationFrame(() => fit([box]));
  });
})();
