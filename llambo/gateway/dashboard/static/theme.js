// Read before the first paint, so that nobody who chose dark sees a white flash.
(function () {
  let chosen = null;
  try {
    chosen = localStorage.getItem("llambo.theme");
  } catch {
    // Storage may be forbidden; then the system's scheme is the right one.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
