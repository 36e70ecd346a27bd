
"use strict";
for (const viewer of document.querySelectorAll(".viewer")) {
  const stage = viewer.querySelector(".stage");
  const pictures = [...stage.querySelectorAll("img")];
  const [left, right] = viewer.querySelectorAll("select");
  const range = stage.querySelector("input");
  const show = () => {
    // The left one lies above the right one, cut off at the divider. A copy lets both sides show the same version.
    stage.querySelector(".copy")?.remove();
    for (const picture of pictures) {
      picture.hidden = true;
      picture.classList.remove("upper");
    }
    const lower = pictures[right.value];
    let upper = pictures[left.value];
    if (upper === lower) {
      upper = lower.cloneNode();
      upper.classList.add("copy");
      stage.prepend(upper);
    }
    lower.hidden = upper.hidden = false;
    upper.classList.add("upper");
    viewer.querySelector(".note-left").textContent = "Left: " + pictures[left.value].dataset.note;
    viewer.querySelector(".note-right").textContent = "Right: " + lower.dataset.note;
  };
  const move = () => stage.style.setProperty("--cut", range.value + "%");
  left.addEventListener("change", show);
  right.addEventListener("change", show);
  range.addEventListener("input", move);
  show();
  move();
}
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    };
    const missing = (value) => value === "–";
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}
