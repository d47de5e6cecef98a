// Text of the model reaches the page through textContent only.
"use strict";

const element = (id) => document.getElementById(id);
let model = "";
let hasScores = false;  // whether the server has a token reward model
let running = null;  // AbortController of the current question

function show(message, isError = false) {
  element("status").textContent = message;
  element("status").className = isError ? "error" : "";
}

async function request(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  if (element("key").value) headers.Authorization = "Bearer " + element("key").value;
  const options = body ? {method: "POST", body: JSON.stringify(body)} : {};
  const reply = await fetch(path, {...options, headers, signal});
  if (reply.status === 401) element("keyed").hidden = false;
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  return reply;
}

async function loadModel() {
  const served = (await (await request("v1/models")).json()).data[0];
  model = served.id;
  hasScores = served.has_token_scores;
  element("legend").hidden = !hasScores;
  element("model").textContent = model;
}

// Yields the objects of a stream of server-sent events.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

function addSolution(index) {
  const article = document.createElement("article");
  const title = document.createElement("h3");
  const text = document.createElement("pre");
  title.textContent = `Solution ${index + 1}`;
  article.append(title, text);
  element("solutions").append(article);
  return {index, article, title, text, answer: null, finished: false};
}

function showAnswers(solutions) {
  const finished = solutions.filter((solution) => solution.finished);
  const groups = new Map();
  for (const solution of finished) {
    const group = solution.answer ? solution.answer.group : null;
    groups.set(group, [...(groups.get(group) || []), solution]);
  }
  const size = (group) => (group[0] === null ? 0 : group[1].length);
  const sorted = [...groups].sort((a, b) => size(b) - size(a));
  const items = sorted.map(([group, members]) => {
    const item = document.createElement("li");
    const share = document.createElement("meter");
    const answer = document.createElement(group === null ? "em" : "code");
    share.max = solutions.length;
    share.value = members.length;
    answer.textContent = group === null ? "no answer" : members[0].answer.answer;
    const numbers = members.map((member) => member.index + 1).join(", ");
    item.append(share, answer, ` ${members.length} of ${solutions.length}: ${numbers}`);
    return item;
  });
  element("answers").replaceChildren(...items);
  const most = sorted.length ? sorted[0][0] : null;
  for (const {article, answer} of finished) {
    article.classList.toggle("most", answer !== null && answer.group === most);
  }
}

// Colours tokens from red (score 0) over none (0.5) to green (1).
async function colour(solution, messages, signal) {
  const text = solution.text.textContent;
  if (!text) return;
  const reply = await request("scores", {messages, text}, signal);
  const spans = (await reply.json()).tokens.map((token) => {
    const span = document.createElement("span");
    const strength = Math.sqrt(2 * Math.abs(token.score - 0.5));
    const hue = token.score < 0.5 ? 0 : 130;
    span.textContent = token.text;
    span.title = token.score.toFixed(3);
    span.style.backgroundColor = `hsl(${hue} 80% 50% / ${0.6 * strength})`;
    return span;
  });
  solution.text.replaceChildren(...spans);
}

async function finish(solution, reason, solutions, signal) {
  const texts = [solution.text.textContent];
  const reply = await request("answers", {texts}, signal);
  // A solution that was cut off has no final answer.
  if (reason === "stop") solution.answer = (await reply.json()).answers[0];
  const end = reason === "length" ? ", cut off" : "";
  const answer = solution.answer ? `: ${solution.answer.answer}` : "";
  solution.title.textContent = `Solution ${solution.index + 1}${end}${answer}`;
  solution.finished = true;
  showAnswers(solutions);
}

async function solve(signal) {
  if (!model) await loadModel();
  const count = Number(element("count").value);
  element("solutions").replaceChildren();
  element("answers").replaceChildren();
  const solutions = Array.from({length: count}, (_, index) => addSolution(index));
  const body = {
    model,
    messages: [{role: "user", content: element("question").value}],
    n: count,
    temperature: Number(element("temperature").value),
    max_completion_tokens: Number(element("tokens").value) || undefined,
    stream: true,
  };
  const reply = await request("v1/chat/completions", body, signal);
  const endings = [];
  for await (const event of events(reply)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      const solution = solutions[choice.index];
      solution.text.append(choice.delta.content || "");
      const reason = choice.finish_reason;
      if (!reason) continue;
      endings.push(finish(solution, reason, solutions, signal));
      if (hasScores) endings.push(colour(solution, body.messages, signal));
    }
  }
  await Promise.all(endings);
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  running = new AbortController();
  element("solve").disabled = true;
  element("stop").disabled = false;
  show("solving ...");
  try {
    await solve(running.signal);
    show("");
  } catch (error) {
    show(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    element("solve").disabled = false;
    element("stop").disabled = true;
  }
});

element("stop").addEventListener("click", () => running.abort());
loadModel().catch((error) => show(error.message, true));
