// Tables and lists of claims sort and filter; a link to something folded unfolds it.
const number = (text) => {
  const found = text.replaceAll('−', '-').replaceAll(',', '').match(/-?\d+(\.\d+)?(e-?\d+)?/);
  return found ? parseFloat(found[0]) : NaN;
};
const compare = (a, b) => {
  const [x, y] = [number(a), number(b)];
  if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
  return isNaN(x) || x === y ? a.localeCompare(b) : x - y;
};
for (const table of document.querySelectorAll('table')) {
  const body = table.tBodies[0], heads = [...table.querySelectorAll('thead th')];
  if (!body || body.rows.length < 3) continue;
  const sort = (column) => {
    const down = heads[column].getAttribute('aria-sort') === 'ascending';
    heads.forEach((head) => head.removeAttribute('aria-sort'));
    heads[column].setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const text = (row) => (row.cells[column] ? row.cells[column].innerText : '');
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(text(a), text(b)));
    body.append(...rows);
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.title = 'Sort';
    head.addEventListener('click', () => sort(column));
    head.addEventListener('keydown', (event) => event.key === 'Enter' && sort(column));
  });
}
const field = document.getElementById('filter');
if (field) {
  field.hidden = false;
  field.querySelector('input').addEventListener('input', (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.querySelectorAll('[data-row]'))
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
}
const unfold = () => {
  const found = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = found; at; at = at.parentElement) if (at.tagName === 'DETAILS') at.open = true;
  if (found) found.scrollIntoView();
};
addEventListener('hashchange', unfold);
if (location.hash) unfold();
