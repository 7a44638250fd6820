'use strict';
(() => {
  const root = document.documentElement;
  root.classList.add('js');
  const byId = id => document.getElementById(id);

  const copy = byId('copy');
  if (copy) copy.addEventListener('click', async () => {
    const text = byId('command').textContent;
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = 'Copied';
    } catch {                                      // no permission: select it, so that the keyboard can copy
      getSelection().selectAllChildren(byId('command'));
      copy.textContent = 'Selected';
    }
    setTimeout(() => { copy.textContent = 'Copy'; }, 2000);
  });

  const gallery = byId('tiles');
  if (!gallery) return;
  const { classes, errors } = JSON.parse(byId('data').textContent);
  const tiles = [...gallery.children];
  const heatmaps = gallery.querySelector('.p') !== null;
  const classless = gallery.querySelector('.t') === null;  // a method that explains no class has one heatmap
  const views = heatmaps ? classless ? ['', 'p'] : ['', 'p', 't'] : [''];
  const names = { '': 'image', p: classless ? 'heatmap' : 'heatmap for the predicted class', t: 'heatmap for the true class' };

  // ---- which tiles, in which order
  const filter = { t: null, p: null };            // class numbers, null for any
  const filters = [...document.querySelectorAll('#matrix button, .chips button')];
  const sort = byId('sort');
  const FIRST = 20;                               // tiles at first, so that what follows the gallery is near
  const more = byId('more');
  let matches = tiles, whole = false;

  function total() {                               // errors of the split, on the page or left out
    let n = 0;
    for (const [t, p, count] of errors) if ((filter.t ?? t) === t && (filter.p ?? p) === p) n += count;
    return n;
  }

  const count = n => n.toLocaleString('en-US');

  function describe() {
    const all = total();
    const what = filter.t !== null && filter.p !== null ? `${classes[filter.t]} taken for ${classes[filter.p]}`
      : filter.t !== null ? `true class ${classes[filter.t]}`
      : filter.p !== null ? `predicted class ${classes[filter.p]}` : '';
    const n = matches.length;
    const number = n < all ? `${count(n)} of ${count(all)} errors` : n === 1 ? '1 error' : `${count(n)} errors`;
    return what ? `${number}: ${what}` : number;
  }

  function update() {
    const sign = sort.value.startsWith('-') ? -1 : 1, key = sort.value.slice(-1);
    tiles.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]) || a.dataset.i - b.dataset.i);
    matches = tiles.filter(({ dataset: { t, p } }) => (filter.t ?? +t) === +t && (filter.p ?? +p) === +p);
    const shown = whole ? matches : matches.slice(0, FIRST);
    gallery.replaceChildren(...shown);              // much faster than to hide the others one by one
    rove(gallery, shown[0]?.firstElementChild);
    more.hidden = shown.length === matches.length;
    more.textContent = `Show all ${count(matches.length)}`;
    for (const button of filters) {
      const { t, p } = classesOf(button), pressed = String(t === filter.t && p === filter.p);
      if (button.getAttribute('aria-pressed') !== pressed) button.setAttribute('aria-pressed', pressed);
    }
    byId('status').textContent = describe();
  }

  const number = text => text === undefined ? null : +text;
  const classesOf = button => ({ t: number(button.dataset.t), p: number(button.dataset.p) });

  for (const button of filters) button.addEventListener('click', () => {
    Object.assign(filter, classesOf(button));
    update();
    const toolbar = byId('toolbar');
    const top = toolbar.parentElement.getBoundingClientRect().top;
    if (top < 0 || top > innerHeight * 0.55) toolbar.parentElement.scrollIntoView();
  });
  sort.addEventListener('change', update);
  more.addEventListener('click', () => {
    whole = true;
    update();
    rove(gallery, gallery.children[FIRST].firstElementChild).focus();
  });

  // ---- what a tile shows
  const view = tile => tile.dataset.view ?? '';
  function show(tile, next) {
    if (next) tile.dataset.view = next; else delete tile.dataset.view;
    label(tile);
  }
  function label(tile) {
    const { i, t, p, c, l } = tile.dataset, now = view(tile);
    const faint = now && [...tile.classList].some(name => name.startsWith('faint-') && name.slice(6).includes(now));
    tile.firstElementChild.setAttribute('aria-label', `Image ${i}: true ${classes[t]}, predicted ${classes[p]}, ` +
      `confidence ${(100 * c).toFixed(1)} %, loss ${(+l).toFixed(2)}. Showing ${names[now]}${faint ? ', negligible' : ''}.`);
  }

  for (const button of document.querySelectorAll('[data-show]')) button.addEventListener('click', () => {
    for (const other of document.querySelectorAll('[data-show]')) other.setAttribute('aria-pressed', other === button);
    for (const tile of tiles) show(tile, button.dataset.show);
  });

  const tileOf = event => event.target.closest('.pic')?.parentElement;
  gallery.addEventListener('click', event => {
    const tile = tileOf(event);
    if (!tile) return;
    delete tile.dataset.peek;
    show(tile, views[(views.indexOf(view(tile)) + 1) % views.length]);
    rove(gallery, tile.firstElementChild);
  });
  gallery.addEventListener('pointerover', event => {  // a mouse that rests on an image lifts the first heatmap
    const tile = tileOf(event);
    if (event.pointerType !== 'mouse' || !tile || !heatmaps || view(tile) || tile.contains(event.relatedTarget)) return;
    tile.dataset.peek = '';
    show(tile, 'p');
  });
  gallery.addEventListener('pointerout', event => {
    const tile = tileOf(event);
    if (!tile || tile.firstElementChild.contains(event.relatedTarget) || !('peek' in tile.dataset)) return;
    delete tile.dataset.peek;
    show(tile, '');
  });

  // ---- keys: one stop of Tab for the table and one for the gallery, arrows inside
  function rove(group, button) {
    for (const other of group.querySelectorAll('button[tabindex="0"]')) other.tabIndex = -1;
    if (button) button.tabIndex = 0;
    return button;
  }

  gallery.addEventListener('keydown', event => {
    const shown = [...gallery.children], tile = tileOf(event), at = shown.indexOf(tile);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (views[event.key - 1] !== undefined) {
      delete tile.dataset.peek;
      return show(tile, views[event.key - 1]);
    }
    const perRow = Math.max(1, shown.findIndex(other => other.offsetTop > shown[0].offsetTop));
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - perRow, ArrowDown: at + perRow, Home: 0, End: shown.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    rove(gallery, shown[Math.min(Math.max(to, 0), shown.length - 1)].firstElementChild).focus();
  });

  const table = byId('matrix');
  table.addEventListener('keydown', event => {
    const cell = event.target.closest('td, th');
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [];
    if (!cell || down === undefined) return;
    event.preventDefault();
    let row = cell.parentElement.rowIndex + down, column = cell.cellIndex + right;
    for (; table.rows[row]?.cells[column]; row += down, column += right) {
      const button = table.rows[row].cells[column].querySelector('button');
      if (button) return rove(table, button).focus();
    }
  });
  table.addEventListener('focusin', event => rove(table, event.target.closest('button')));

  for (const button of document.querySelectorAll('#matrix button, .pic')) button.tabIndex = -1;
  rove(table, table.querySelector('tbody button'));
  for (const tile of tiles) label(tile);
  update();
})();
