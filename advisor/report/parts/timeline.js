"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const slider = document.getElementById("slider");
  const words = data.words;
  const MIB = 2 ** 20, GIB = 2 ** 30;
  const LEFT = 72, TOP = 34, BOTTOM = 132, HEIGHT = 340;
  let view = null, layout = null, at = data.peak || 0;

  // Ties to even, as in the tables: 16.25 MiB is an exact tie, and toFixed would round it up.
  function rounded(value, digits) {
    const scaled = value * 10 ** digits;
    const low = Math.floor(scaled);
    const up = scaled - low > 0.5 || (scaled - low === 0.5 && low % 2 === 1);
    return ((low + up) / 10 ** digits).toFixed(digits);
  }

  function bytes(size) {
    if (size >= GIB) return rounded(size / GIB, 2).replace(/\B(?=(\d{3})+\.)/g, ",") + " GiB";
    if (size >= MIB) return rounded(size / MIB, 1) + " MiB";
    return size >= 1024 ? rounded(size / 1024, 1) + " KiB" : size + " B";
  }

  function total(point) {
    return data.allocated.reduce((sum, column) => sum + column[point], 0);
  }

  // A phrase of the page's language with its values in their places.
  function phrase(name, ...values) {
    return words[name].replace(/\{(\d)\}/g, (_, index) => values[index]);
  }

  // Spans with the points they own, and the point -> span table.
  const owner = [];
  const spans = data.spans.map((span) => {
    const first = owner.length;
    for (let i = 0; i < span.points; i++) owner.push(null);
    const placed = { ...span, first, end: first + span.points };
    owner.fill(placed, first, placed.end);
    return placed;
  });

  // Consecutive spans of one stage; their width is the cube root of their events.
  function stagesOf(shown) {
    const stages = [];
    for (const span of shown) {
      const name = span.stage;
      const last = stages.at(-1);
      if (last && last.name === name && last.step === span.step) {
        last.spans.push(span);
        last.events += span.events;
      } else {
        stages.push({ name, step: span.step, spans: [span], events: span.events });
      }
    }
    return stages;
  }

  function place(width) {
    const shown = spans.filter((span) => view === null || span.step === view);
    const stages = stagesOf(shown);
    const sum = stages.reduce((part, stage) => part + Math.cbrt(stage.events), 0);
    const first = shown[0].first, end = shown.at(-1).end;
    const x = new Array(end - first + 1);
    let left = LEFT;
    for (const stage of stages) {
      stage.x = left;
      stage.width = (width * Math.cbrt(stage.events)) / sum;
      for (const span of stage.spans) {
        const part = (stage.width * span.events) / stage.events;
        span.x = left;
        for (let i = 0; i < span.points; i++) x[span.first - first + i] = left + (part * i) / span.points;
        left += part;
      }
    }
    x[end - first] = left;
    return { stages, first, end, x, right: left };
  }

  function element(name, attributes, parent, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function highest() {
    let top = 1;
    for (let i = layout.first; i < layout.end; i++) top = Math.max(top, total(i), data.reserved[i] || 0);
    const limit = data.gpu_total;
    return limit && limit <= 4 * top ? Math.max(top, limit) : top;
  }

  function drawScale(svg, top, y) {
    const unit = top >= GIB ? GIB : MIB;
    const rough = top / unit / 8;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    for (let value = 0; value * unit <= top * 1.02; value += step) {
      const height = y(value * unit);
      element("line", { class: "grid", x1: LEFT, x2: layout.right, y1: height, y2: height }, svg);
      const digits = Math.max(0, -Math.floor(Math.log10(step)));
      const text = value.toFixed(digits) + (unit === GIB ? " GiB" : " MiB");
      element("text", { class: "quiet", x: LEFT - 8, y: height + 4, "text-anchor": "end" }, svg, text);
    }
  }

  function drawStages(svg) {
    const base = TOP + HEIGHT;
    let last = -Infinity;
    layout.stages.forEach((stage, index) => {
      const middle = stage.x + stage.width / 2;
      if (index % 2) element("rect", { class: "band", x: stage.x, y: TOP, width: stage.width, height: HEIGHT }, svg);
      element("line", { class: "tick", x1: stage.x, x2: stage.x, y1: base, y2: base + 10 }, svg);
      for (const span of stage.spans.slice(1)) {
        element("line", { class: "tick", x1: span.x, x2: span.x, y1: base, y2: base + 4 }, svg);
      }
      if (middle - last < 13) return;
      last = middle;
      const layers = [...new Set([stage.spans[0].layer, stage.spans.at(-1).layer])].filter((layer) => layer !== null);
      const numbers = layers.length ? ` ${layers.join(" – ")}` : "";
      const turn = `rotate(-40 ${middle} ${base + 18})`;
      element("text", { x: middle, y: base + 18, "text-anchor": "end", transform: turn }, svg, stage.name + numbers);
    });
  }

  function drawSteps(svg) {
    let step = 0;
    for (const stage of layout.stages) {
      if (view === null && stage.step > step) {
        step = stage.step;
        element("line", { class: "tick", x1: stage.x, x2: stage.x, y1: TOP - 20, y2: TOP + HEIGHT }, svg);
        element("text", { class: "quiet", x: stage.x + 5, y: TOP - 10 }, svg, phrase("step", step));
      }
    }
  }

  function drawAreas(svg, y) {
    const { first, end, x } = layout;
    const under = new Float64Array(end - first);
    data.allocated.forEach((column, component) => {
      let over = "", back = "", any = false;
      for (let i = first; i < end; i++) {
        const from = x[i - first].toFixed(1), to = x[i - first + 1].toFixed(1);
        const low = y(under[i - first]).toFixed(1);
        under[i - first] += column[i];
        any = any || column[i] > 0;
        over += `${i > first ? "L" : "M"}${from},${y(under[i - first]).toFixed(1)}H${to}`;
        back = `L${to},${low}H${from}` + back;
      }
      if (any) element("path", { class: `c${component}`, d: over + back + "Z" }, svg);
    });
  }

  function drawReserved(svg, y) {
    const { first, end, x } = layout;
    let line = "";
    for (let i = first; i < end && data.reserved[i] !== null; i++) {
      const height = y(data.reserved[i]).toFixed(1);
      line += `${line ? "L" : "M"}${x[i - first].toFixed(1)},${height}H${x[i - first + 1].toFixed(1)}`;
    }
    if (!line) return;
    element("path", { class: "reserved", d: line }, svg);
    element("text", { class: "halo", x: LEFT + 8, y: y(data.reserved[first]) - 6 }, svg, words.reserved);
  }

  function drawLimit(svg, top, y) {
    const limit = data.gpu_total;
    if (!limit) return;
    if (limit <= top) {
      element("line", { class: "limit", x1: LEFT, x2: layout.right, y1: y(limit), y2: y(limit) }, svg);
    }
    const text = phrase(limit <= top ? "limit" : "limit_above", bytes(limit));
    const height = limit <= top ? y(limit) - 6 : TOP - 10;
    element("text", { class: "limit-text", x: layout.right, y: height, "text-anchor": "end" }, svg, text);
  }

  function drawLabel(svg, text, x, y) {
    const before = x > (LEFT + layout.right) / 2;
    element("text", { class: "halo", x: x + (before ? -8 : 8), y, "text-anchor": before ? "end" : "start" }, svg, text);
  }

  function failure() {
    const i = data.event.findIndex((event) => event >= data.failed.event);
    return i < 0 ? data.event.length - 1 : i;
  }

  function drawMarks(svg, y) {
    const { first, end, x } = layout;
    const middle = (i) => (x[i - first] + x[i - first + 1]) / 2;
    if (data.failed) {
      const i = failure();
      if (i >= first && i < end) {
        element("line", { class: "limit", x1: x[i - first], x2: x[i - first], y1: TOP, y2: TOP + HEIGHT }, svg);
        drawLabel(svg, phrase("failed", bytes(data.failed.bytes)), x[i - first], TOP + HEIGHT - 10);
      }
    }
    if (data.peak >= first && data.peak < end) {
      const height = y(total(data.peak));
      element("circle", { class: "peak", cx: middle(data.peak), cy: height, r: 4 }, svg);
      drawLabel(svg, phrase("peak", bytes(total(data.peak))), middle(data.peak), height - 8);
    }
  }

  function draw() {
    const width = Math.max(chart.clientWidth, 280);
    layout = place(width - LEFT - 8);
    const svg = element("svg", { viewBox: `0 0 ${width} ${TOP + HEIGHT + BOTTOM}` });
    const top = highest() * 1.04;
    const y = (size) => TOP + HEIGHT * (1 - size / top);
    drawStages(svg);
    drawScale(svg, top, y);
    drawAreas(svg, y);
    drawSteps(svg);
    drawReserved(svg, y);
    drawLimit(svg, top, y);
    drawMarks(svg, y);
    layout.cursor = element("line", { class: "cursor", y1: TOP, y2: TOP + HEIGHT }, svg);
    svg.addEventListener("pointermove", (event) => point(svg, event));
    svg.addEventListener("pointerdown", (event) => point(svg, event));
    chart.replaceChildren(svg);
    slider.min = layout.first;
    slider.max = layout.end - 1;
    select(Math.min(Math.max(at, layout.first), layout.end - 1));
  }

  function point(svg, event) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width;
    let low = 0, high = layout.end - layout.first - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (layout.x[middle] <= x) low = middle; else high = middle - 1;
    }
    select(layout.first + low);
  }

  function select(index) {
    at = index;
    const span = owner[at];
    const x = (layout.x[at - layout.first] + layout.x[at - layout.first + 1]) / 2;
    layout.cursor.setAttribute("x1", x);
    layout.cursor.setAttribute("x2", x);
    const place = span.step ? [span.moment, phrase("step", span.step)] : [span.moment];
    const sizes = [phrase("allocated", bytes(total(at)))];
    if (data.reserved[at] !== null) sizes.push(phrase("reserved_bytes", bytes(data.reserved[at])));
    const text = `${place.join(words.comma)}: ${sizes.join(words.comma)}`;
    document.getElementById("moment").textContent = text;
    slider.value = at;
    slider.setAttribute("aria-valuetext", text);
    for (const cell of document.querySelectorAll("[data-here]")) {
      cell.textContent = bytes(data.allocated[cell.dataset.here][at]);
    }
    document.getElementById("tensors").replaceChildren(...data.largest[at].map(item));
  }

  function item(index) {
    const [count, size, component, described, module, operation] = data.tensors[index];
    const row = document.createElement("li");
    const swatch = document.createElement("span");
    swatch.className = `swatch c${component}`;
    const strong = document.createElement("strong");
    strong.textContent = (count > 1 ? `${count} × ` : "") + bytes(size);
    const quiet = document.createElement("span");
    quiet.textContent = ` ${data.components[component]}: ${[operation, module].filter(Boolean).join(" · ")}`;
    row.append(swatch, strong, ` ${described}`, quiet);
    return row;
  }

  function choose(step) {
    view = step;
    for (const input of document.querySelectorAll("#views input")) input.checked = input.value === String(step);
    draw();
  }

  function offer(step, text) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "radio";
    input.name = "view";
    input.value = String(step);
    input.addEventListener("change", () => choose(step));
    label.append(input, text);
    document.getElementById("views").append(label);
  }

  if (!spans.length) return;
  offer(null, words.everything);
  for (let step = 1; step <= spans.at(-1).step; step++) offer(step, phrase("step", step));
  slider.addEventListener("input", () => select(Number(slider.value)));
  document.getElementById("to-peak").addEventListener("click", () => {
    at = data.peak;
    choose(view === null ? null : owner[at].step || null);
  });
  let width = 0;
  new ResizeObserver(() => {
    if (chart.clientWidth && chart.clientWidth !== width) {
      width = chart.clientWidth;
      draw();
    }
  }).observe(chart);
  if (data.failed) at = failure();
  choose(owner[at].step || null);
})();
