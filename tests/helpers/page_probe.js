// What a reader would see of a page: whether it is too wide, what it loads, how well its text and
// lines stand out from what is behind them, how large its text is, and which labels collide.

function colour(text) {
  const found = text.match(/[\d.]+/g).map(Number);
  return { rgb: found.slice(0, 3), alpha: found.length > 3 ? found[3] : 1 };
}

function hex(text) {
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

function luminance(rgb) {
  // WCAG 2.2, relative luminance
  const [r, g, b] = rgb.map((c) => c / 255).map((c) =>
    c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const found = colour(at.ownerDocument.defaultView.getComputedStyle(at).backgroundColor);
    if (found.alpha === 1) return found.rgb;
  }
  return [255, 255, 255];
}

function overlap(a, b) {
  const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  return across > 1 && down > 2;
}

function texts(document) {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() && element.tagName !== "title") found.push(element);
  }
  return found;
}

function study(frame) {
  const { contentDocument: document, contentWindow: window } = frame;
  const found = {
    background: window.getComputedStyle(document.body).backgroundColor,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    loaded: window.performance.getEntriesByType("resource").map((entry) => entry.name),
    faint: [], thin: [], small: [], colliding: [], cut: [], unnamed: 0,
  };
  for (const element of texts(document)) {
    const style = window.getComputedStyle(element), svg = element.closest("svg");
    const ink = colour(svg ? style.fill : style.color).rgb;
    // numbers in the fields of a map have a ground of their own
    const field = element.closest("[data-ground]");
    const ground = field ? hex(field.dataset.ground) : behind(element);
    if (contrast(ink, ground) < 4.5) found.faint.push(element.textContent);
    const scale = svg ? svg.getScreenCTM().a : 1;
    if (parseFloat(style.fontSize) * scale < 9.5) found.small.push(element.textContent);
  }
  for (const line of document.querySelectorAll(".line, .link, .bar, .node")) {
    const style = window.getComputedStyle(line);
    const ink = colour(style.stroke === "none" ? style.fill : style.stroke).rgb;
    if (contrast(ink, behind(line)) < 3) found.thin.push(line.getAttribute("class"));
  }
  for (const svg of document.querySelectorAll("svg[role=img]")) {
    if (!svg.getAttribute("aria-label")) found.unnamed += 1;
    const frame = svg.getBoundingClientRect();
    const labels = [...svg.querySelectorAll("text")];
    const boxes = labels.map((label) => label.getBoundingClientRect());
    boxes.forEach((box, n) => {
      const outside = box.left < frame.left - 1 || box.right > frame.right + 1 ||
        box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
      if (outside) found.cut.push(labels[n].textContent);
      for (let m = 0; m < n; m += 1) {
        if (overlap(box, boxes[m])) {
          found.colliding.push(`${labels[m].textContent} | ${labels[n].textContent}`);
        }
      }
    });
  }
  return found;
}

async function main() {
  const results = [];
  for (const [address, width] of PAGES) {
    const frame = document.createElement("iframe");
    frame.width = width;
    frame.height = 900;
    frame.style.border = "0";
    frame.src = address;
    await new Promise((loaded) => {
      frame.onload = loaded;
      document.body.append(frame);
    });
    results.push({ address, width, ...study(frame) });
    frame.remove();
  }
  const said = document.createElement("pre");
  said.id = "found";
  said.textContent = JSON.stringify(results);
  document.body.append(said);
}

main();
