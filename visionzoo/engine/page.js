"use strict";
const at = (id) => document.getElementById(id);
let number = null, method = null, place = null, asked = 0;

function say(text, wrong = false) {
  at("message").textContent = text;
  at("message").className = wrong ? "error" : "";
}

async function answer(response) {
  if (response.ok) return response;
  let text = `The page answered ${response.status}.`;
  try { text = (await response.json()).error; } catch { /* no words of its own */ }
  throw new Error(text);
}

async function open(request) {
  const turn = ++asked;
  say("The model looks at the picture …");
  try {
    const found = await (await answer(await request)).json();
    if (turn !== asked) return;
    number = found.number;
    place = null;
    at("mark").hidden = true;
    at("picture").src = `pictures/${number}`;
    const rows = at("classes").tBodies[0];
    rows.replaceChildren(...found.classes.map((each) => {
      const row = document.createElement("tr"), meter = document.createElement("meter");
      meter.value = each.probability;
      row.insertCell().textContent = each.name;
      row.insertCell().append(meter);
      row.insertCell().textContent = `${(100 * each.probability).toFixed(1)} %`;
      return row;
    }));
    at("found").hidden = false;
    say("");
    show();
  } catch (error) {
    if (turn === asked) say(error.message, true);
  }
}

async function show() {
  if (number === null || method === null) return;
  const turn = ++asked, view = at("view"), words = at("words");
  for (const button of at("methods").children) button.setAttribute("aria-pressed", button.name === method);
  words.className = "";
  words.textContent = "The view is being made …";
  try {
    const query = place ? `?y=${place[0]}&x=${place[1]}` : "";
    const response = await answer(await fetch(`pictures/${number}/${method}${query}`));
    const content = new Uint8Array(await response.arrayBuffer());
    if (turn !== asked) return;
    let text = "";
    for (let i = 0; i < content.length; i += 8192) text += String.fromCharCode(...content.subarray(i, i + 8192));
    view.src = `data:image/png;base64,${btoa(text)}`;
    view.alt = method;
    view.hidden = false;
    words.textContent = response.headers.get("X-Words") || at("methods").querySelector(`[name=${method}]`).title;
  } catch (error) {
    if (turn !== asked) return;
    view.hidden = true;
    words.className = "error";
    words.textContent = error.message;
  }
}

at("upload").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (file) open(fetch("pictures", { method: "POST", body: file }));
});
at("files").addEventListener("change", (event) => open(fetch(`files/${event.target.value}`, { method: "POST" })));
at("frame").addEventListener("click", (event) => {
  const box = at("picture").getBoundingClientRect();
  place = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width]
    .map((share) => Math.min(1, Math.max(0, share)));
  at("mark").style.top = `${100 * place[0]}%`;
  at("mark").style.left = `${100 * place[1]}%`;
  at("mark").hidden = false;
  show();
});

(async () => {
  try {
    const about = await (await answer(await fetch("about"))).json();
    at("title").textContent = about.title;
    for (const [name, text] of Object.entries(about.methods)) {
      const button = document.createElement("button");
      button.name = name;
      button.title = text;
      button.textContent = name.replaceAll("_", " ");
      button.addEventListener("click", () => { method = name; show(); });
      at("methods").append(button);
    }
    method = Object.keys(about.methods)[0] ?? null;
    about.files.forEach((name, i) => at("files").add(new Option(name, i)));
    at("listed").hidden = !about.files.length;
    if (about.files.length) open(fetch("files/0", { method: "POST" }));
    else say("Open a picture.");
  } catch (error) {
    say(error.message, true);
  }
})();
