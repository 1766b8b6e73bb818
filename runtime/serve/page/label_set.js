// Label sets as the server takes them (see runtime/label_sets.py), taken apart into single labels.

/**
 * What a set in any of its forms says: `labels`, each {name, groups, entry}, where `entry` is what
 * it says of the label (null: no more than its name) and `groups` those it is in, coarse to fine;
 * and as `rest` its background and templates. Throws where it is no set at all.
 * `order` gives the names in their order, for objects lose that of names such as "7".
 */
export function parse(given, order = []) {
  const isLong = !Array.isArray(given) && Object.hasOwn(given, "labels");
  const { labels, ...rest } = isLong ? given : { labels: given };
  const place = new Map(order.map((name, index) => [name, index]));
  const found = [...walk(labels, [])];
  found.sort((one, other) => (place.get(one.name) ?? 0) - (place.get(other.name) ?? 0));
  return { labels: found, rest };
}

function* walk(given, groups) {
  if (Array.isArray(given)) {
    for (const name of given) yield { name: String(name), groups, entry: null };
    return;
  }
  for (const [name, entry] of Object.entries(given)) {
    if (Object.hasOwn(entry, "labels")) yield* walk(entry.labels, [...groups, name]);
    else yield { name, groups, entry: isPlain(name, entry) ? null : entry };
  }
}

const isPlain = (name, entry) =>
  Array.isArray(entry) ? entry.length === 1 && entry[0] === name : Object.keys(entry).length === 0;

/** The shortest form of a set. */
export function compose({ labels, rest }) {
  const plain = labels.every(({ entry, groups }) => entry === null && groups.length === 0);
  if (!plain) return composeLong({ labels, rest });
  const names = labels.map(({ name }) => name);
  return Object.keys(rest).length ? { labels: names, ...rest } : names;
}

/** The long form, in which everything can be said. */
export function composeLong({ labels, rest }) {
  const tree = Object.create(null); // any name may be a key
  for (const { name, groups, entry } of labels) {
    let branch = tree;
    for (const group of groups) {
      branch[group] ??= { labels: Object.create(null) };
      branch = branch[group].labels;
    }
    branch[name] = entry ?? [name];
  }
  return { labels: tree, ...rest };
}
