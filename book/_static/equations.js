// On a phone an equation that is too wide is set smaller, down to a size that is still read; only then does it scroll.
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
  window.addEventListener("load", () => window.MathJax?.startup?.promise?.then(fit));
  window.addEventListener("resize", fit);
})();
