// Asks before an action on the mesh, and shows its error if it fails.

import { $, setText } from "./dom.js";

let doing = null;

export function begin() {
  const dialog = $("confirm");
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  $("confirm-yes").addEventListener("click", async () => {
    const yes = $("confirm-yes");
    yes.disabled = true;
    setText($("confirm-problem"), "");
    try {
      await doing.act($("confirm-check").checked);
      dialog.close();
    } catch (error) {
      setText($("confirm-problem"), error.message);
    } finally {
      yes.disabled = false;
    }
  });
}

/** `option`: the label of a checkbox; `act` is called with its value. */
export function confirm(what) {
  doing = what;
  setText($("confirm-title"), what.title);
  setText($("confirm-text"), what.text);
  setText($("confirm-yes"), what.yes);
  setText($("confirm-label"), what.option ?? "");
  setText($("confirm-problem"), "");
  $("confirm-check").checked = false;
  $("confirm-option").hidden = !what.option;
  $("confirm").showModal();
}
