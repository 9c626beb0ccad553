// Runs once for each live picture, with `this` the element that brought it there. Where a page refuses it, all else
// works, and an arrow key moves a slider by a tenth of its length.
(function (element) {
  const set = (node, name, value) => {
    if (node && node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  };

  // ipywidgets gives a slider's handle no name, reads out the logarithm of a logarithmic slider's value, and says "null"
  // where the mouse rests on a label. It also replaces the inside of a text at each change, and a screen reader wants to
  // know the place before the words come: so the place is marked, not the words.
  const name = (box) => {
    box.querySelectorAll('.widget-slider').forEach((slider) => {
      const label = slider.querySelector('.widget-label').textContent;
      const readout = slider.querySelector('.widget-readout');
      const handle = slider.querySelector('[role=slider], .ui-slider-handle');
      set(handle, 'aria-label', label);
      set(handle, 'aria-valuetext', readout.textContent);
      set(readout, 'role', 'textbox');
      set(readout, 'aria-label', label + ', typed');
    });
    box.querySelectorAll('[title=null]').forEach((label) => label.removeAttribute('title'));
    box.querySelectorAll('.widget-toggle-button').forEach((button) => {
      set(button, 'aria-expanded', button.matches('.mod-active'));
    });
    box.querySelectorAll('.dpteach-aloud').forEach((place) => set(place, 'aria-live', 'polite'));
  };

  // A slider without stops has no step for an arrow key either: a key types the next number, with as many digits as a
  // dragged one has (controls.py).
  const onKey = (event) => {
    const ways = {ArrowRight: 1, ArrowUp: 1, PageUp: 5, ArrowLeft: -1, ArrowDown: -1, PageDown: -5};
    const way = ways[event.key];
    const slider = event.target.closest('[class*=dpteach-by-]');
    if (!way || !slider || !event.target.matches('[role=slider], .ui-slider-handle')) return;
    event.preventDefault();
    event.stopPropagation();
    const readout = slider.querySelector('.widget-readout');
    const now = parseFloat(readout.textContent);
    const by = /dpteach-by-([^ ]+)/.exec(slider.className)[1];
    let next = by === 'log' ? 10 ** (Math.round(20 * Math.log10(now) + way) / 20) : Math.round(now / by + way) * by;
    const whole = Math.round(next);
    if (!/[.e]/.test(readout.textContent)) next = way < 0 ? Math.min(now - 1, whole) : Math.max(now + 1, whole);
    readout.textContent = next.toPrecision(by === 'log' ? 3 : 6);
    readout.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 13, bubbles: true}));
  };

  // A page copies for a click only, and what is shown only. A click on a dot chooses its run in the menu.
  const onClick = (event) => {
    const {target} = event;
    if (target.closest('.dpteach-copy')) {
      target.closest('.widget-box').querySelector('.dpteach-script textarea').select();
      document.execCommand('copy');
    }
    const dot = target.closest('[data-run]');
    if (!dot) return;
    const menu = dot.closest('.dpteach').querySelector('.dpteach-back select');
    menu.selectedIndex = [...menu.options].findIndex((o) => o.text.match(/^run\s(\d+):/)?.[1] === dot.dataset.run);
    menu.dispatchEvent(new Event('change', {bubbles: true}));
  };

  const begin = () => {
    const box = element.closest('.dpteach');
    if (!box) {
      setTimeout(begin, 100);
      return;
    }
    if (!box.parentElement.closest('.dpteach')) {
      box.addEventListener('keydown', onKey, true);
      box.addEventListener('click', onClick);
    }
    const watched = {subtree: true, childList: true, attributes: true, attributeFilter: ['aria-valuetext']};
    new MutationObserver(() => name(box)).observe(box, watched);
    name(box);
  };
  begin();
})(this);
