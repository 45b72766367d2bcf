// The page: signing in, following the mesh, and when it is drawn.

import { $, setData, setText } from "./dom.js";
import { follow } from "./live.js";
import { Mesh } from "./mesh.js";
import * as activity from "./activity.js";
import * as confirm from "./confirm.js";
import * as figures from "./figures.js";
import * as models from "./models.js";
import * as places from "./places.js";
import * as playground from "./playground.js";
import * as requests from "./requests.js";
import * as story from "./story.js";
import * as workers from "./workers.js";

const KEY = "llambo.token";
const THEMES = ["auto", "light", "dark"];

const mesh = new Mesh();
let token = storedToken();
let leave = null;
let due = 0;
let connected = false;

for (const part of [activity, confirm, figures, models, places, playground, requests, story, workers]) part.begin();
beginTheme();
beginSignIn();
look();
// Ages change although nothing happens.
setInterval(() => mesh.known && draw(), 1_000);

// Following the mesh.

function look() {
  leave?.();
  story.use(token);
  link("waiting", "Connecting");
  leave = follow(token, {
    message(message) {
      mesh.take(message);
      if (token) storeToken(token);
      present("board");
      draw();
    },
    live() {
      connected = true;
    },
    lost(why) {
      connected = false;
      link("lost", why);
    },
    refused(error) {
      const had = token;
      forget();
      present("signin");
      link("waiting", "Signed out");
      setText($("signin-problem"), had ? `${error.message}.` : "");
      $("token").focus();
    },
  });
}

/** Once for each frame, however many messages come between two. Hidden tabs have no frames, and need none. */
function draw() {
  if (due) return;
  due = requestAnimationFrame(() => {
    due = 0;
    mesh.age();
    if (connected) link(mesh.problem ? "lost" : "live", mesh.problem ? "The broker does not answer" : "Live");
    figures.show(mesh);
    workers.show(mesh, token);
    models.show(mesh, token);
    requests.show(mesh);
    activity.show(mesh);
    places.show(mesh);
    playground.show(mesh, token);
    story.show(mesh);
    document.title = `${mesh.mesh.ready ?? 0}/${mesh.mesh.workers ?? 0} ready · llambo`;
  });
}

function link(state, text) {
  setData($("link"), "state", state);
  setText($("link-text"), text);
}

function present(which) {
  $("board").hidden = which !== "board";
  $("signin").hidden = which !== "signin";
  $("signout").hidden = !token;
}

// Signing in and out.

function beginSignIn() {
  $("signin-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    $("token").value = "";
    setText($("signin-problem"), "");
    look();
  });
  $("signout").addEventListener("click", () => {
    forget();
    look();
  });
}

function forget() {
  token = "";
  storeToken("");
  mesh.clear();
  story.use("");
  $("story").close();
  $("confirm").close();
}

// Where storage is forbidden, the token is valid until the page is left.

function storedToken() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

function storeToken(what) {
  try {
    if (what) sessionStorage.setItem(KEY, what);
    else sessionStorage.removeItem(KEY);
  } catch {
    // As described above.
  }
}

// Light and dark.

function beginTheme() {
  const button = $("theme");
  const chosen = () => document.documentElement.dataset.theme ?? "auto";
  const show = () => setText(button, `Theme: ${chosen()}`);
  show();
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(chosen()) + 1) % THEMES.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("llambo.theme", next);
    } catch {
      // Where storage is forbidden, the choice is valid for this visit.
    }
    show();
  });
}
