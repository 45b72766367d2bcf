// Runs before the first paint, so that a page with the dark theme does not flash white.
(function () {
  let chosen = null;
  try {
    chosen = localStorage.getItem("llambo.theme");
  } catch {
    // Storage may be forbidden; then the scheme of the system is used.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
