// The slice viewer: two volumes, three planes each, one cursor. Plain canvas, no library, nothing fetched.
(() => {
  "use strict";
  const root = document.getElementById("viewer");
  if (!root) return;
  const volumes = JSON.parse(document.getElementById("viewer-data").textContent).volumes;
  const AXES = ["x", "y", "z"];
  // Of each plane: the axis that runs to the right, the one that runs up, and the one through it.
  const PLANES = { axial: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0] };
  const GAIN = 5; // a difference of 0.2 is white
  const cursor = [0.5, 0.5, 0.5]; // in shares of the box, so that volumes of different grids share it
  const sliders = AXES.map((axis) => document.getElementById(`slice-${axis}`));
  const outputs = AXES.map((axis) => document.getElementById(`place-${axis}`));
  const difference = document.getElementById("difference");
  const status = document.getElementById("viewer-status");
  const panes = Array.from(root.querySelectorAll(".pane"), (element) => ({
    select: element.querySelector("select"),
    canvases: Array.from(element.querySelectorAll("canvas")),
    volume: null,
  }));
  const decoded = new Map();

  async function decode(entry) {
    const image = new Image();
    image.src = entry.data;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const [nx, ny, nz] = entry.shape;
    const voxels = new Uint8Array(nx * ny * nz);
    for (let z = 0, to = 0; z < nz; z++) {
      const left = (z % entry.columns) * nx;
      const top = Math.floor(z / entry.columns) * ny;
      for (let y = 0; y < ny; y++) {
        let from = 4 * ((top + y) * canvas.width + left);
        for (let x = 0; x < nx; x++, from += 4) voxels[to++] = pixels[from];
      }
    }
    return { ...entry, voxels, strides: [1, nx, nx * ny] };
  }

  function load(number) {
    if (!decoded.has(number)) decoded.set(number, decode(volumes[number]));
    return decoded.get(number);
  }

  const index = (volume, axis) => Math.min(volume.shape[axis] - 1, Math.floor(cursor[axis] * volume.shape[axis]));
  const millimetres = (volume, axis) => Math.round(volume.origin[axis] + index(volume, axis) * volume.size[axis]);
  const subtractable = () =>
    panes.every((pane) => pane.volume) && panes[0].volume.shape.join() === panes[1].volume.shape.join();

  function slice(volume, plane, other) {
    const [across, up, through] = PLANES[plane];
    const width = volume.shape[across];
    const height = volume.shape[up];
    const image = new ImageData(width, height);
    const start = index(volume, through) * volume.strides[through];
    for (let row = 0, to = 0; row < height; row++) {
      let from = start + (height - 1 - row) * volume.strides[up];
      for (let column = 0; column < width; column++, from += volume.strides[across], to += 4) {
        const value = other ? Math.min(255, GAIN * Math.abs(volume.voxels[from] - other.voxels[from])) : volume.voxels[from];
        image.data[to] = image.data[to + 1] = image.data[to + 2] = value;
        image.data[to + 3] = 255;
      }
    }
    return image;
  }

  function drawPlane(canvas, volume, other) {
    const plane = canvas.dataset.plane;
    const [across, up, through] = PLANES[plane];
    const wide = volume.shape[across] * volume.size[across];
    const tall = volume.shape[up] * volume.size[up];
    canvas.style.aspectRatio = `${wide} / ${tall}`;
    const width = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
    const height = Math.max(1, Math.round((width * tall) / wide));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const image = slice(volume, plane, other);
    const source = document.createElement("canvas");
    [source.width, source.height] = [image.width, image.height];
    source.getContext("2d").putImageData(image, 0, 0);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, width, height);
    const x = ((index(volume, across) + 0.5) / volume.shape[across]) * width;
    const y = (1 - (index(volume, up) + 0.5) / volume.shape[up]) * height;
    const gap = 0.04 * width; // what is looked at stays visible
    context.strokeStyle = "rgba(255, 196, 61, 0.75)";
    context.lineWidth = Math.max(1, width / 300);
    context.beginPath();
    for (const [fromX, fromY, toX, toY] of [
      [0, y, x - gap, y], [x + gap, y, width, y], [x, 0, x, y - gap], [x, y + gap, x, height],
    ]) {
      context.moveTo(fromX, fromY);
      context.lineTo(toX, toY);
    }
    context.stroke();
    canvas.setAttribute(
      "aria-label",
      `${plane} slice of ${volume.label}${other ? ", difference from the left volume" : ""}, ` +
        `${AXES[through]} = ${millimetres(volume, through)} mm`,
    );
  }

  function draw() {
    const subtracting = difference.checked && subtractable();
    panes.forEach((pane, place) => {
      if (!pane.volume) return;
      const other = place === 1 && subtracting ? panes[0].volume : null;
      for (const canvas of pane.canvases) drawPlane(canvas, pane.volume, other);
    });
    const volume = panes[0].volume;
    if (!volume) return;
    sliders.forEach((slider, axis) => {
      slider.max = volume.shape[axis] - 1;
      slider.value = index(volume, axis);
      const place = `${millimetres(volume, axis)} mm`.replace("-", "−");
      outputs[axis].textContent = place;
      slider.setAttribute("aria-valuetext", place);
    });
    status.textContent = !difference.checked
      ? ""
      : subtracting
        ? "On the right: the absolute difference of the two."
        : "These two differ in their grids: no difference is shown.";
  }

  let waiting = false;
  function refresh() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  async function choose(pane) {
    root.setAttribute("aria-busy", "true");
    const number = Number(pane.select.value);
    const volume = await load(number);
    if (Number(pane.select.value) !== number) return; // another one was chosen meanwhile
    pane.volume = volume;
    draw();
    root.setAttribute("aria-busy", String(!panes.every((each) => each.volume)));
  }

  function move(axis, voxels, volume) {
    const place = Math.min(volume.shape[axis] - 1, Math.max(0, index(volume, axis) + voxels));
    cursor[axis] = (place + 0.5) / volume.shape[axis];
    refresh();
  }

  function point(pane, canvas, event) {
    const [across, up] = PLANES[canvas.dataset.plane];
    const box = canvas.getBoundingClientRect();
    const inside = (share) => Math.min(0.9999, Math.max(0, share));
    cursor[across] = inside((event.clientX - box.left) / box.width);
    cursor[up] = inside(1 - (event.clientY - box.top) / box.height);
    refresh();
  }

  for (const pane of panes) {
    pane.select.addEventListener("change", () => choose(pane));
    for (const canvas of pane.canvases) {
      const [across, up, through] = PLANES[canvas.dataset.plane];
      const keys = {
        ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowDown: [up, -1], ArrowUp: [up, 1],
        PageDown: [through, -1], PageUp: [through, 1],
      };
      canvas.addEventListener("keydown", (event) => {
        if (!(event.key in keys) || !pane.volume) return;
        event.preventDefault();
        move(...keys[event.key], pane.volume);
      });
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        point(pane, canvas, event);
      });
      canvas.addEventListener("pointermove", (event) => {
        if (event.buttons || event.pointerType === "touch") point(pane, canvas, event);
      });
    }
  }
  sliders.forEach((slider, axis) =>
    slider.addEventListener("input", () => {
      const volume = panes[0].volume;
      if (volume) move(axis, Number(slider.value) - index(volume, axis), volume);
    }),
  );
  difference.addEventListener("change", refresh);
  new ResizeObserver(refresh).observe(root);
  root.hidden = false;
  panes.forEach(choose);
})();
