"use strict";
// Every question lists the pictures that were chosen, best first, by their place on the page, from 0.
const main = document.querySelector("main"), id = main.dataset.id, key = "minti-" + id;
const pages = [...main.querySelectorAll("section")], questions = pages.slice(0, -1);
const [back, status, next] = document.querySelector("nav").children;
const choices = questions.map(question => [...question.querySelectorAll(".choice")]);

function begin() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  const respondent = [...bytes].map(byte => byte.toString(16).padStart(2, "0")).join("");
  return { page: 0, respondent, answers: questions.map(() => []) };
}

let state = begin();
try {
  state = JSON.parse(localStorage.getItem(key)) || state;
} catch { /* a browser that keeps nothing */ }

function complete(page) {
  return page >= questions.length || state.answers[page].length === choices[page].length;
}

function show(turned) {
  try {
    localStorage.setItem(key, JSON.stringify(state));
  } catch { /* the answers last as long as the page is open */ }
  const { page, respondent, answers } = state;
  pages.forEach((section, i) => { section.hidden = i !== page; });
  choices.forEach((buttons, i) => buttons.forEach((button, j) => {
    const rank = answers[i].indexOf(j) + 1;
    button.setAttribute("aria-pressed", rank > 0);
    button.lastElementChild.textContent = rank || "";
  }));
  back.disabled = page === 0;
  next.disabled = !complete(page);
  next.hidden = page === questions.length;
  const ranked = page < questions.length ? `, ${answers[page].length} of ${choices[page].length} ranked` : "";
  status.textContent = page < questions.length ? `Question ${page + 1} of ${questions.length}${ranked}` : "Done";
  const text = JSON.stringify({ questionnaire: id, respondent, answers });
  document.querySelector("textarea").value = text;
  const link = document.querySelector("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `answers-${id}-${respondent}.json`;
  if (turned) {
    scrollTo(0, 0);
    pages[page].querySelector("h2").focus();
  }
}

function choose(page, place) {
  const answer = state.answers[page], at = answer.indexOf(place);
  if (at < 0) answer.push(place);
  else answer.splice(at, 1);  // those behind it move up
  show();
}

function turn(by) {
  if (by > 0 ? next.disabled || next.hidden : back.disabled) return;
  state.page += by;
  show(true);
}

choices.forEach((buttons, i) => buttons.forEach((button, j) => {
  button.onclick = () => choose(i, j);
}));
back.onclick = () => turn(-1);
next.onclick = () => turn(1);
document.getElementById("save").onclick = () => document.querySelector("a").click();
document.getElementById("anew").onclick = () => {
  if (confirm("Forget these answers and begin anew? Save them first.")) {
    state = begin();
    show(true);
  }
};
document.onkeydown = event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "TEXTAREA") return;
  const letter = event.key.length === 1 ? event.key.toLowerCase().charCodeAt(0) - 97 : -1;
  if (event.key === "ArrowLeft") turn(-1);
  else if (event.key === "ArrowRight") turn(1);
  else if (state.page < questions.length && choices[state.page][letter]) choose(state.page, letter);
};
show();
