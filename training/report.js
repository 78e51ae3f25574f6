// Moves the boxes and the play heads with the clips, and shows what a mark stands for. The page says the same without it.
(() => {
  const tip = document.getElementById("tip");
  const show = (target, x, y) => {
    tip.textContent = target.dataset.tip;
    tip.classList.add("on");
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(innerWidth - box.width - 8, x + 14)) + "px";
    tip.style.top = (y + box.height + 22 > innerHeight ? y - box.height - 12 : y + 14) + "px";
  };
  const hide = () => tip.classList.remove("on");
  document.addEventListener("pointermove", (event) => {
    const target = event.target.closest && event.target.closest("[data-tip]");
    if (target) show(target, event.clientX, event.clientY); else hide();
  });
  document.addEventListener("focusin", (event) => {
    if (!event.target.dataset || !event.target.dataset.tip) return hide();
    const box = event.target.getBoundingClientRect();
    show(event.target, box.x + box.width / 2, box.y + box.height / 2);
  });
  document.addEventListener("focusout", hide);

  const figures = [...document.querySelectorAll("figure[data-boxes]")].map((figure) => ({
    video: figure.querySelector("video"),
    rects: [figure.querySelector("rect.subject"), figure.querySelector("rect.object")],
    boxes: JSON.parse(figure.dataset.boxes),
    fps: Number(figure.dataset.fps),
    chart: figure.querySelector("svg.ssr"),
    head: figure.querySelector(".head"),
    time: null,
    last: -1,
  }));
  // The time of the frame on screen, where the browser tells it; the clock of the clip is a little ahead of it.
  figures.forEach((item) => {
    if (!item.video.requestVideoFrameCallback) return;
    const note = (_, frame) => { item.time = frame.mediaTime; item.video.requestVideoFrameCallback(note); };
    item.video.requestVideoFrameCallback(note);
  });
  const place = (item) => {
    const frame = Math.min(item.boxes.length - 1, Math.floor((item.time ?? item.video.currentTime) * item.fps + 0.01));
    if (frame === item.last) return;
    item.last = frame;
    item.rects.forEach((rect, which) => {
      const box = item.boxes[frame][which];
      rect.style.display = box ? "" : "none";
      if (!box) return;
      rect.setAttribute("x", box[0]); rect.setAttribute("y", box[1]);
      rect.setAttribute("width", box[2] - box[0]); rect.setAttribute("height", box[3] - box[1]);
    });
    if (item.chart) {
      const { left, right, frames } = item.chart.dataset;
      const x = Number(left) + (Number(right) - Number(left)) * frame / (Number(frames) - 1);
      item.head.setAttribute("x1", x); item.head.setAttribute("x2", x);
    }
  };
  const step = () => { figures.forEach(place); requestAnimationFrame(step); };
  step();

  const boxes = document.getElementById("boxes");
  if (boxes) boxes.addEventListener("change", () => document.body.classList.toggle("no-boxes", !boxes.checked));
  const play = document.getElementById("play");
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const set = (on) => {
    figures.forEach(({ video }) => { if (on) video.play().catch(() => {}); else video.pause(); });
    if (play) { play.textContent = on ? "Pause all" : "Play all"; play.dataset.on = on ? "1" : ""; }
  };
  if (play) play.addEventListener("click", () => {
    const on = !play.dataset.on;
    if (on) figures.forEach(({ video }) => { video.currentTime = 0; });
    set(on);
  });
  set(!calm);
})();
