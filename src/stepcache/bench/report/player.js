"use strict";
// Clips are decoded into bitmaps once, frame by frame, and drawn from them: two that play together cannot drift apart.
const data = JSON.parse(document.getElementById("data").textContent);
const texts = new Map([...document.querySelectorAll("script.clip")].map((s) => [s.dataset.key, s]));
const $ = (id) => document.getElementById(id);
const KEPT = 6; // films in memory
const films = new Map();
const state = { prompt: 0, left: data.reference, right: "", mode: "side", frame: 0, wipe: 0.5, gain: 8, playing: false };
let shown = { a: null, b: null };
let request = 0;

const key = (method) => {
  const p = data.prompts[state.prompt];
  return `${method}|${p.index}|${p.seed}`;
};

const once = (target, name) =>
  new Promise((resolve, reject) => {
    target.addEventListener(name, resolve, { once: true });
    target.addEventListener("error", () => reject(new Error("this browser cannot play the clip")), { once: true });
  });

// "seeked" may come before the frame itself: what is presented says of which time it is.
async function seek(video, time) {
  const sought = once(video, "seeked");
  const presented = new Promise((resolve) => {
    if (!video.requestVideoFrameCallback) return resolve();
    const look = (_, { mediaTime }) =>
      Math.abs(mediaTime + 0.5 / data.fps - time) <= 0.75 / data.fps ? resolve() : video.requestVideoFrameCallback(look);
    video.requestVideoFrameCallback(look);
  });
  video.currentTime = time;
  await sought;
  await Promise.race([presented, new Promise((resolve) => setTimeout(resolve, 1000))]);
}

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// Frames that are pictures of their own, one a line.
async function pictures(lines, progress) {
  const frames = [];
  for (const line of lines) {
    frames.push(await createImageBitmap(new Blob([bytes(line)])));
    progress(frames.length, lines.length);
  }
  return { frames, width: frames[0].width, height: frames[0].height };
}

async function decode(name, progress) {
  const text = texts.get(name).textContent.trim();
  if (data.lossless) return pictures(text.split("\n"), progress);
  const raw = bytes(text);
  const url = URL.createObjectURL(new Blob([raw], { type: "video/mp4" }));
  const video = document.createElement("video");
  video.muted = true;
  video.playsInline = true;
  video.preload = "auto";
  try {
    const ready = once(video, "loadeddata");
    video.src = url;
    await ready;
    const count = data.frames[name];
    const frames = [];
    for (let k = 0; k < count; k++) {
      await seek(video, Math.min((k + 0.5) / data.fps, video.duration - 1e-3));
      frames.push(await createImageBitmap(video));
      progress(k + 1, count);
    }
    return { frames, width: video.videoWidth, height: video.videoHeight };
  } finally {
    video.removeAttribute("src");
    URL.revokeObjectURL(url);
  }
}

async function film(method, progress) {
  const name = key(method);
  if (!texts.has(name)) return null;
  if (!films.has(name)) films.set(name, decode(name, progress));
  const found = films.get(name);
  films.delete(name); // the latest used is last
  films.set(name, found);
  try {
    return await found;
  } catch (error) {
    films.delete(name);
    throw error;
  } finally {
    while (films.size > KEPT) {
      const [oldest, old] = films.entries().next().value;
      films.delete(oldest);
      old.then((f) => f.frames.forEach((b) => b.close())).catch(() => {});
    }
  }
}

async function load() {
  const mine = ++request;
  const p = data.prompts[state.prompt];
  $("text").textContent = `“${p.text}” (seed ${p.seed})`;
  const say = (k, n) => mine === request && ($("status").textContent = k < n ? `decoding frame ${k} of ${n}` : "");
  try {
    const a = await film(state.left, say);
    const b = await film(state.right, say);
    if (mine !== request) return;
    shown = { a, b };
    const gone = [a ? null : state.left, b ? null : state.right].filter(Boolean);
    $("status").textContent = gone.length ? `no clip of ${gone.map((m) => data.labels[m]).join(" and ")} for this prompt` : "";
  } catch (error) {
    if (mine !== request) return;
    shown = { a: null, b: null };
    $("status").textContent = error.message;
  }
  state.frame = Math.min(state.frame, length() - 1);
  $("frame").max = length() - 1;
  draw();
  document.body.dataset.loaded = `${state.prompt} ${state.left} ${state.right}`;
}

const length = () => Math.max(1, Math.min(...[shown.a, shown.b].filter(Boolean).map((f) => f.frames.length), Infinity) || 1);

function paint(canvas, source) {
  const f = source || shown.a || shown.b;
  canvas.width = f ? f.width : 16;
  canvas.height = f ? f.height : 16;
  canvas.classList.toggle("small", canvas.width <= 160);
  const context = canvas.getContext("2d");
  if (source) context.drawImage(source.frames[state.frame], 0, 0);
  return context;
}

function draw() {
  const { a, b } = shown;
  const single = state.mode !== "side";
  $("a").parentElement.hidden = $("b").parentElement.hidden = single;
  $("both").parentElement.hidden = !single;
  if (!single) {
    paint($("a"), a);
    paint($("b"), b);
  } else {
    const context = paint($("both"), a);
    const width = $("both").width;
    $("both").style.filter = state.mode === "difference" ? `brightness(${state.gain})` : "";
    if (b && state.mode === "difference") {
      context.globalCompositeOperation = "difference";
      context.drawImage(b.frames[state.frame], 0, 0);
    } else if (b) {
      const cut = Math.round(width * state.wipe);
      context.save();
      context.beginPath();
      context.rect(cut, 0, width - cut, $("both").height);
      context.clip();
      context.drawImage(b.frames[state.frame], 0, 0);
      context.restore();
      context.fillStyle = "#ffffff";
      context.fillRect(cut, 0, Math.max(1, width / 320), $("both").height);
    }
  }
  $("a-name").textContent = caption(state.left);
  $("b-name").textContent = caption(state.right);
  $("both-name").textContent =
    state.mode === "wipe" ? `left: ${caption(state.left)} — right: ${caption(state.right)}`
      : `difference of ${data.labels[state.left]} and ${data.labels[state.right]}, ${state.gain} times`;
  $("frame").value = state.frame;
  $("frame-number").value = `${state.frame + 1}/${length()}`;
  document.body.dataset.frame = state.frame;
}

function caption(method) {
  const f = data.figures[key(method)];
  const name = data.labels[method];
  if (!f) return name;
  const [psnr, ssim, computed, identical] = f;
  if (method === data.reference) return `${name}, ${computed} steps`;
  return `${name}, ${computed} steps: ${identical ? "identical" : `${psnr.toFixed(2)} dB, SSIM ${ssim.toFixed(4)}`}`;
}

let last = 0;
function tick(now) {
  if (!state.playing) return;
  if (now - last >= 1000 / data.fps) {
    last = now - last > 2000 / data.fps ? now : last + 1000 / data.fps;
    state.frame = (state.frame + 1) % length();
    draw();
  }
  requestAnimationFrame(tick);
}

function play(on) {
  state.playing = on;
  $("play").textContent = on ? "pause" : "play";
  $("play").setAttribute("aria-pressed", on);
  if (on) {
    last = performance.now();
    requestAnimationFrame(tick);
  }
}

function step(by) {
  play(false);
  state.frame = (state.frame + by + length()) % length();
  draw();
}

function mode(name) {
  state.mode = name;
  document.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.mode === name));
  $("wipe-label").hidden = name !== "wipe";
  $("gain-label").hidden = name !== "difference";
  draw();
}

function wipe(value) {
  state.wipe = Math.min(1, Math.max(0, value));
  $("wipe").value = 100 * state.wipe;
  draw();
}

function prompt(index) {
  state.prompt = (index + data.prompts.length) % data.prompts.length;
  $("prompt").value = state.prompt;
  load();
}

function options(select, values, chosen) {
  for (const [value, text] of values) {
    const option = document.createElement("option");
    option.value = value;
    option.textContent = text;
    select.append(option);
  }
  select.value = chosen;
}

const KEYS = {
  " ": () => play(!state.playing),
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  n: () => prompt(state.prompt + 1),
  p: () => prompt(state.prompt - 1),
  1: () => mode("side"),
  2: () => mode("wipe"),
  3: () => mode("difference"),
  "[": () => wipe(state.wipe - 0.05),
  "]": () => wipe(state.wipe + 0.05),
};

function start() {
  if (!data.prompts.length || !data.clips.length) {
    $("players").hidden = true;
    return;
  }
  const others = data.methods.filter((m) => m !== data.reference);
  state.right = others[0] || data.reference;
  const short = (text) => (text.length > 90 ? `${text.slice(0, 89)}…` : text);
  const severalSeeds = new Set(data.prompts.map((p) => p.seed)).size > 1;
  options($("prompt"), data.prompts.map((p, i) => [i, short(p.text) + (severalSeeds ? ` (seed ${p.seed})` : "")]), 0);
  for (const side of ["left", "right"]) {
    options($(side), data.methods.map((m) => [m, data.labels[m]]), state[side]);
    $(side).addEventListener("change", () => {
      state[side] = $(side).value;
      load();
    });
  }
  $("prompt").addEventListener("change", () => prompt(Number($("prompt").value)));
  $("play").addEventListener("click", () => play(!state.playing));
  $("back").addEventListener("click", () => step(-1));
  $("forth").addEventListener("click", () => step(1));
  $("frame").addEventListener("input", () => {
    play(false);
    state.frame = Number($("frame").value);
    draw();
  });
  $("wipe").addEventListener("input", () => wipe($("wipe").value / 100));
  $("both").addEventListener("pointermove", (e) => {
    if (state.mode === "wipe" && (e.buttons || e.pointerType === "mouse")) {
      wipe(e.offsetX / $("both").clientWidth);
    }
  });
  $("gain").addEventListener("input", () => {
    state.gain = Number($("gain").value);
    $("gain-number").value = `${state.gain}×`;
    draw();
  });
  document.querySelectorAll("[data-mode]").forEach((b) => b.addEventListener("click", () => mode(b.dataset.mode)));
  document.addEventListener("keydown", (e) => {
    const typing = ["SELECT", "INPUT", "TEXTAREA"].includes(e.target.tagName);
    const pressing = e.target.tagName === "BUTTON" && e.key === " ";
    if (typing || pressing || e.ctrlKey || e.metaKey || e.altKey || !KEYS[e.key]) return;
    e.preventDefault();
    KEYS[e.key]();
  });
  load();
}

start();
