"use strict";
// Search and order for each list of rows. Rows are moved and hidden, never written: their text stays as the page has it.
const FEW = 8;
for (const box of document.querySelectorAll(".rows")) {
  const rows = [...box.querySelectorAll("details.row")];
  const list = box.querySelector(".list"), all = box.querySelector(".all"), count = box.querySelector("output");
  const search = box.querySelector("input"), order = box.querySelector(".order"), kind = box.querySelector(".kind");
  const texts = new Map();
  const text = (row) => {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  };
  let most = FEW;

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = kind ? kind.value : "";
    const found = rows.filter((row) =>
      words.every((word) => text(row).includes(word)) &&
      (!wanted || (wanted === "flagged" ? row.dataset.flagged : row.dataset.kind === wanted)));
    const value = (row) => row.dataset[order.value] === undefined ? Infinity : Number(row.dataset[order.value]);
    found.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      return a === b ? one.dataset.order - other.dataset.order : a < b ? -1 : 1;
    });
    list.replaceChildren(...found.slice(0, most));
    count.textContent = found.length === rows.length ? `${rows.length} rows` : `${found.length} of ${rows.length} rows`;
    all.hidden = found.length <= most;
    all.textContent = `Show all ${found.length}`;
  }

  for (const control of [search, order, kind]) {
    if (control) control.addEventListener("input", () => { most = FEW; show(); });
  }
  all.addEventListener("click", () => { most = Infinity; show(); });
  box.querySelector(".tools").hidden = false;
  show();
}
