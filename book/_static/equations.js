// On a phone an equation that is too wide is set smaller, down to a size that is still read; only then does it scroll.
// A full stop or a comma stays on the line of the formula before it.
(() => {
  const SMALLEST = 88; // percent of the text's size
  const fit = () => {
    for (const equation of document.querySelectorAll('mjx-container[display="true"]')) {
      const own = parseFloat((equation.dataset.size ??= equation.style.fontSize));
      equation.style.fontSize = `${own}%`;
      const share = equation.clientWidth / equation.scrollWidth;
      if (window.innerWidth <= 600 && share < 1) {
        equation.style.fontSize = `${Math.max(SMALLEST, Math.floor(own * share) - 1)}%`;
      }
    }
  };
  const hold = () => {
    for (const formula of document.querySelectorAll('span.math mjx-container:not([display="true"])')) {
      const span = formula.parentElement;
      const after = span.nextSibling;
      const mark = after?.nodeType === Node.TEXT_NODE && after.data.match(/^[.,;:!?)]+/)?.[0];
      if (mark) {
        after.data = after.data.slice(mark.length);
        span.append(mark);
        span.style.whiteSpace = "nowrap";
      }
    }
  };
  const typeset = () => {
    hold();
    fit();
  };
  window.addEventListener("load", () => window.MathJax?.startup?.promise?.then(typeset));
  window.addEventListener("resize", fit);
  document.addEventListener("toggle", fit, true); // what was folded had no width before
})();
