"use strict";
(() => {
  document.documentElement.classList.add("js");
  const find = (id) => document.getElementById(id);
  const said = find("said");

  async function copy(button) {
    const source = find(button.dataset.copy);
    let copied = false;
    try {
      await navigator.clipboard.writeText(source.textContent);
      copied = true;
    } catch {
      // Without the clipboard's permission: the text is selected, and the browser is asked the old way.
      const range = document.createRange();
      range.selectNodeContents(source);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? said.dataset.copied : said.dataset.selected;
    said.textContent = copied ? said.dataset.copied : said.dataset.byHand;
    setTimeout(() => {
      button.textContent = said.dataset.idle;
      said.textContent = "";
    }, 2000);
  }
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));

  const data = JSON.parse(find("data").textContent);
  if (data === null) return;
  const plot = find("plot"), cursor = find("cursor"), slider = find("slider"), tensors = find("tensors");
  const names = [...document.querySelectorAll(".memory tbody th:has(rect[class^=c])")].map((cell) => cell.textContent);

  function element(name, look, text) {
    const node = document.createElement(name);
    if (look) node.className = look;
    node.textContent = text;
    return node;
  }

  function item(index) {
    const [much, component, what, whose] = data.tensors[index];
    const row = document.createElement("li");
    const quiet = element("span", "quiet", what);
    quiet.append(document.createElement("br"), whose);
    row.append(element("span", "much", much), " ", element("span", `key c${component}`, ""), names[component]);
    row.append(document.createElement("br"), quiet);
    return row;
  }

  function show(point) {
    cursor.setAttribute("x", `${(data.edges[point] + data.edges[point + 1]) / 2}%`);
    cursor.setAttribute("visibility", "visible");
    const text = `${data.moments[data.moment[point]]}: ${data.sizes[point]}`;
    find("moment").textContent = text;
    tensors.replaceChildren(...data.largest[point].map(item));
    slider.value = point;
    slider.setAttribute("aria-valuetext", text);
  }

  function under(event) {
    const box = plot.getBoundingClientRect();
    const share = (100 * (event.clientX - box.left)) / box.width;
    let low = 0, high = data.sizes.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (data.edges[middle] <= share) low = middle; else high = middle - 1;
    }
    show(low);
  }

  plot.addEventListener("pointermove", under);
  plot.addEventListener("pointerdown", under);
  slider.addEventListener("input", () => show(Number(slider.value)));
  find("to-peak").addEventListener("click", () => show(data.peak));
  for (const moment of document.querySelectorAll(".moment")) {
    moment.querySelector("title").remove(); // its text is the label's, and what is shown below says more
    moment.addEventListener("focus", () => {
      if (moment.matches(":focus-visible")) show(Number(moment.dataset.point));
    });
  }
  show(data.peak);
})();
