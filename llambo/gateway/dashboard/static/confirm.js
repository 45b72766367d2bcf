// Asks before anything is done to the mesh, and says what came of it.

import { $, say } from "./dom.js";

let doing = null;

export function begin() {
  const dialog = $("confirm");
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  $("confirm-yes").addEventListener("click", async () => {
    const yes = $("confirm-yes");
    yes.disabled = true;
    say($("confirm-problem"), "");
    try {
      await doing.act($("confirm-check").checked);
      dialog.close();
    } catch (error) {
      say($("confirm-problem"), error.message);
    } finally {
      yes.disabled = false;
    }
  });
}

/** `option`: what may be ticked; `act` is told whether it was. */
export function confirm(what) {
  doing = what;
  say($("confirm-title"), what.title);
  say($("confirm-text"), what.text);
  say($("confirm-yes"), what.yes);
  say($("confirm-label"), what.option ?? "");
  say($("confirm-problem"), "");
  $("confirm-check").checked = false;
  $("confirm-option").hidden = !what.option;
  $("confirm").showModal();
}
