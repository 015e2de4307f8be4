//! The `cache` key: a path, a list of paths, a map, or a list of those. Pure.

use std::path::{Component, Path, PathBuf};

use clap::ValueEnum;

use super::Cache;
use super::names::Scope;
use super::yaml::{Entry, Fault, Kind, Node, Place};
use crate::cli::ending::When;
use crate::cli::values;

/// The least room that a volume is granted.
pub const LEAST_SIZE: u64 = 20 << 30;

/// How many volumes a key may name, and how many paths a volume may have.
const MOST: usize = 256;

const KEYS: [&str; 13] = [
    "name",
    "paths",
    "size",
    "scope",
    "labels",
    "label-file",
    "lock-file",
    "parents",
    "exclude",
    "read-only",
    "commit",
    "link",
    "existing",
];

/// What a `cache` key says.
#[derive(Debug, PartialEq)]
pub enum Said {
    Nothing,
    /// That there is to be no volume.
    Off,
    Caches(Vec<Cache>),
}

/// Reads the value of a `cache` key. What was understood otherwise than it was written is added to `notes`.
///
/// # Errors
/// A key that is not known, a value of the wrong kind, or one volume twice.
pub fn read(node: &Node, scope: &Scope, notes: &mut Vec<Fault>) -> Result<Said, Fault> {
    if node.is_null() {
        return Ok(Said::Nothing);
    }
    let mut caches: Vec<(Place, Cache)> = Vec::new();
    match (&node.kind, node.as_bool()) {
        (_, Some(false)) => return Ok(Said::Off),
        (_, Some(true)) => {
            return Err(node.fault("a cache is its paths; to go without one write false"));
        }
        (Kind::Text { .. }, None) => {
            let cache = Cache {
                paths: vec![path(node, scope)?],
                ..Cache::named(scope.slug)
            };
            caches.push((node.place, cache));
        }
        (Kind::Map(entries), _) => caches.push((node.place, map(node, entries, scope, notes)?)),
        (Kind::List(items), _) if items.len() > MOST => {
            return Err(node.fault(format!("this list has more than {MOST} entries")));
        }
        (Kind::List(items), _) => {
            let (maps, paths): (Vec<_>, Vec<_>) =
                items.iter().partition(|item| item.entries().is_some());
            if let Some(first) = paths.first() {
                let cache = Cache {
                    paths: distinct(paths.iter().map(|p| path(p, scope)))?,
                    ..Cache::named(scope.slug)
                };
                caches.push((first.place, cache));
            }
            for item in maps {
                let entries = item.entries().unwrap_or_default();
                caches.push((item.place, map(item, entries, scope, notes)?));
            }
        }
    }
    for (at, (place, cache)) in caches.iter().enumerate() {
        if caches[..at].iter().any(|(_, c)| c.volume == cache.volume) {
            let what = format!("the volume {} is there twice", cache.volume);
            return Err(Fault::new(*place, what));
        }
    }
    match caches.is_empty() {
        true => Ok(Said::Nothing),
        false => Ok(Said::Caches(caches.into_iter().map(|(_, c)| c).collect())),
    }
}

fn map(
    node: &Node,
    entries: &[Entry],
    scope: &Scope,
    notes: &mut Vec<Fault>,
) -> Result<Cache, Fault> {
    if let Some(entry) = entries.iter().find(|e| !KEYS.contains(&e.key.as_str())) {
        let what = format!("unknown key {:?}; known are {}", entry.key, KEYS.join(", "));
        return Err(Fault::new(entry.place, what));
    }
    let of = |key: &str| node.get(key).filter(|value| !value.is_null());
    let global = match of("scope").map(|value| (value, value.text())) {
        None | Some((_, Some("pipeline"))) => false,
        Some((_, Some("global"))) => true,
        Some((value, _)) => return Err(value.fault("a scope is pipeline or global")),
    };
    let volume = match of("name") {
        None => scope.slug.to_owned(),
        Some(value) => scope.volume(text(value, "a name")?, global, value.place)?,
    };
    let Some(paths) = of("paths") else {
        return Err(node.fault(format!("the cache {volume} has no paths")));
    };
    if list(paths).len() > MOST {
        return Err(paths.fault(format!("this list has more than {MOST} entries")));
    }
    let paths = distinct(list(paths).iter().map(|p| path(p, scope)))?;
    if paths.is_empty() {
        return Err(node.fault(format!("the cache {volume} has no paths")));
    }
    let size = of("size").map(|value| size(value, notes)).transpose()?;
    let files = |key| -> Result<Vec<PathBuf>, Fault> {
        let nodes = of(key).map(list).unwrap_or_default();
        nodes.iter().map(|file| path(file, scope)).collect()
    };
    let read_only = of("read-only").map(|value| {
        let wrong = || value.fault(format!("read-only is true or false, not {}", value.is_a()));
        value.as_bool().ok_or_else(wrong)
    });
    let read_only = read_only.transpose()?;
    let commit = of("commit").map(|value| Ok((value, one_of(value)?)));
    let commit = commit.transpose()?;
    if let (Some(true), Some((value, when))) = (read_only, &commit)
        && *when != When::Never
    {
        return Err(value.fault("what is read-only commits nothing"));
    }
    let parents = of("parents").map(list).unwrap_or_default();
    let exclude = of("exclude").map(list).unwrap_or_default();
    Ok(Cache {
        volume,
        paths,
        size,
        labels: match of("labels") {
            Some(value) => labels(value, scope)?,
            None => Vec::new(),
        },
        label_files: files("label-file")?,
        lock_files: files("lock-file")?,
        parents: parents
            .iter()
            .map(|p| scope.version(text(p, "a parent")?, global, p.place))
            .collect::<Result<_, _>>()?,
        exclude: exclude
            .iter()
            .map(|p| text(p, "a pattern").map(str::to_owned))
            .collect::<Result<_, _>>()?,
        read_only,
        commit: commit.map(|(_, when)| when),
        link: of("link").map(|value| one_of(value)).transpose()?,
        existing: of("existing").map(|value| one_of(value)).transpose()?,
    })
}

/// A list, or the one thing that stands for a list of itself.
fn list(node: &std::rc::Rc<Node>) -> Vec<&Node> {
    match &node.kind {
        Kind::List(items) => items.iter().map(|item| &**item).collect(),
        _ => vec![node],
    }
}

fn text<'a>(node: &'a Node, what: &str) -> Result<&'a str, Fault> {
    let wrong = || node.fault(format!("{what} is a text, and this is {}", node.is_a()));
    node.text().ok_or_else(wrong)
}

/// A path with the variables in it expanded. A pattern for all that a folder holds means the folder.
fn path(node: &Node, scope: &Scope) -> Result<PathBuf, Fault> {
    let text = scope.expand(text(node, "a path")?, node.place)?;
    let mut folder = text.as_str();
    while let Some(less) = folder
        .strip_suffix("/*")
        .or_else(|| folder.strip_suffix("/**"))
    {
        folder = less;
    }
    if folder.contains(['*', '?']) {
        return Err(node.fault(format!("{text:?} is a pattern, and a path is a folder")));
    }
    let path = values::home_path(folder).map_err(|what| node.fault(what))?;
    Ok(plain(&path))
}

/// The path without `./` and slashes that say nothing.
pub fn plain(path: &Path) -> PathBuf {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    match parts.collect::<PathBuf>() {
        empty if empty.as_os_str().is_empty() => ".".into(),
        path => path,
    }
}

fn distinct(paths: impl Iterator<Item = Result<PathBuf, Fault>>) -> Result<Vec<PathBuf>, Fault> {
    let mut out = Vec::new();
    for path in paths {
        let path = path?;
        if !out.contains(&path) {
            out.push(path);
        }
    }
    Ok(out)
}

fn size(node: &Node, notes: &mut Vec<Fault>) -> Result<u64, Fault> {
    let wrong = || {
        node.fault(format!(
            "a size is such as 20g, and this is {}",
            node.is_a()
        ))
    };
    let text = node.word().ok_or_else(wrong)?;
    let size = values::size(text).map_err(|what| node.fault(what))?;
    if size < LEAST_SIZE {
        let what = format!("the size {text} is raised to 20g, the least there is");
        notes.push(node.fault(what));
    }
    Ok(size.max(LEAST_SIZE))
}

fn labels(node: &Node, scope: &Scope) -> Result<Vec<(String, String)>, Fault> {
    let wrong = |node: &Node| node.fault("labels are a map of texts, or a list of KEY=VALUE");
    match &node.kind {
        Kind::Map(entries) => entries
            .iter()
            .map(|entry| {
                let value = entry.value.scalar().ok_or_else(|| wrong(&entry.value))?;
                let label = format!("{}={}", entry.key, scope.expand(value, entry.value.place)?);
                values::label(&label).map_err(|what| Fault::new(entry.place, what))
            })
            .collect(),
        Kind::List(items) => items
            .iter()
            .map(|item| {
                let label = scope.expand(item.text().ok_or_else(|| wrong(item))?, item.place)?;
                values::label(&label).map_err(|what| item.fault(what))
            })
            .collect(),
        Kind::Text { .. } => Err(wrong(node)),
    }
}

fn one_of<T: ValueEnum>(node: &Node) -> Result<T, Fault> {
    let known = || {
        let values = T::value_variants().iter();
        let names: Vec<String> = values
            .filter_map(|v| v.to_possible_value())
            .map(|v| v.get_name().to_owned())
            .collect();
        node.fault(format!("this must be one of {}", names.join(", ")))
    };
    T::from_str(node.text().ok_or_else(known)?, false).map_err(|_| known())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::caches::names::Matrix;
    use crate::cli::caches::yaml;
    use crate::cli::job::{Existing, Link};

    fn variable(name: &str) -> Option<String> {
        (name == "V").then(|| "3/4".into())
    }

    fn said(text: &str) -> Result<(Said, Vec<String>), String> {
        let scope = Scope {
            slug: "shop",
            variable: &variable,
            matrix: Matrix::None,
        };
        let mut notes = Vec::new();
        let said = yaml::parse(text)
            .and_then(|node| read(&node, &scope, &mut notes))
            .map_err(|fault| fault.to_string())?;
        Ok((said, notes.iter().map(ToString::to_string).collect()))
    }

    fn caches(text: &str) -> Vec<Cache> {
        match said(text) {
            Ok((Said::Caches(caches), _)) => caches,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn cache(volume: &str, paths: &[&str]) -> Cache {
        Cache {
            paths: paths.iter().map(PathBuf::from).collect(),
            ..Cache::named(volume)
        }
    }

    #[test]
    fn a_cache_is_a_path_a_list_a_map_or_a_list_of_maps() {
        for (text, expected) in [
            ("node_modules", vec![cache("shop", &["node_modules"])]),
            ("[a/, ./b, a]", vec![cache("shop", &["a", "b"])]),
            ("{paths: [/x, y]}", vec![cache("shop", &["/x", "y"])]),
            ("{paths: y, name: n}", vec![cache("shop/n", &["y"])]),
            ("{paths: '3', name: \"4\"}", vec![cache("shop/4", &["3"])]),
            (
                "[a, {paths: y, name: n}, b, {paths: 'v-$V', name: 'v-${V}', scope: global}]",
                vec![
                    cache("shop", &["a", "b"]),
                    cache("shop/n", &["y"]),
                    cache(
                        &format!("v-3-4-{}", &blake3::hash(b"3/4").to_hex()[..8]),
                        &["v-3/4"],
                    ),
                ],
            ),
            (
                "['.build/*', 'assets/**/*']",
                vec![cache("shop", &[".build", "assets"])],
            ),
        ] {
            assert_eq!(caches(text), expected, "{text}");
        }
        for (text, expected) in [
            ("~", Said::Nothing),
            ("[]", Said::Nothing),
            ("false", Said::Off),
            ("off", Said::Off),
        ] {
            assert_eq!(said(text).unwrap().0, expected, "{text}");
        }
    }

    #[test]
    fn a_size_below_20g_is_raised_and_said() {
        let (caches, notes) = said("paths: a\nsize: 5g\n").unwrap();
        let expected = Cache {
            size: Some(20 << 30),
            ..cache("shop", &["a"])
        };
        assert_eq!(caches, Said::Caches(vec![expected]));
        assert_eq!(
            notes,
            ["2:7: the size 5g is raised to 20g, the least there is"]
        );
        for size in ["100g", "107374182400"] {
            let (caches, notes) = said(&format!("{{paths: a, size: {size}}}")).unwrap();
            let Said::Caches(caches) = caches else {
                panic!("{caches:?}");
            };
            assert_eq!((caches[0].size, notes.len()), (Some(100 << 30), 0));
        }
    }

    #[test]
    fn the_extras_are_the_options_of_attach() {
        let text = "
            name: deps
            paths: [a]
            labels: {os: debian, v: 20.10, w: '${V}'}
            label-file: l.txt
            lock-file: [./package-lock.json, x]
            parents: [main, main@3, shop]
            exclude: '*.log'
            read-only: false
            commit: on-change
            link: symlink
            existing: seed
        ";
        let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let expected = Cache {
            labels: vec![
                label("os", "debian"),
                label("v", "20.10"),
                label("w", "3/4"),
            ],
            label_files: vec!["l.txt".into()],
            lock_files: vec!["package-lock.json".into(), "x".into()],
            parents: vec!["shop/main".into(), "shop/main@3".into(), "shop".into()],
            exclude: vec!["*.log".into()],
            read_only: Some(false),
            commit: Some(When::OnChange),
            link: Some(Link::Symlink),
            existing: Some(Existing::Seed),
            ..cache("shop/deps", &["a"])
        };
        assert_eq!(caches(text), [expected]);
        assert_eq!(
            caches("{paths: a, labels: [k=v]}")[0].labels,
            [label("k", "v")]
        );
    }

    #[test]
    fn a_mistake_is_named_with_its_place() {
        for (text, start) in [
            ("true", "1:1: a cache is its paths"),
            (
                "paths: a\npath: b",
                "2:1: unknown key \"path\"; known are name, paths",
            ),
            ("name: x", "1:1: the cache shop/x has no paths"),
            ("paths: []", "1:1: the cache shop has no paths"),
            ("- a\n- [b]", "2:3: a path is a text, and this is a list"),
            (
                "- a\n- true",
                "2:3: a path is a text, and this is true or false",
            ),
            ("paths: a\nname: [x]", "2:7: a name is a text"),
            ("3", "1:1: a path is a text, and this is a number"),
            ("paths: 3", "1:8: a path is a text, and this is a number"),
            ("- a\n- 1.5", "2:3: a path is a text, and this is a number"),
            ("paths: {a: b}", "1:8: a path is a text, and this is a map"),
            (
                "paths: a\nname: 0x1f",
                "2:7: a name is a text, and this is a number",
            ),
            ("paths: a\nparents: [x, 7]", "2:14: a parent is a text"),
            ("paths: a\nlock-file: 7", "2:12: a path is a text"),
            ("paths: a\nsize: [20g]", "2:7: a size is such as 20g"),
            (
                "paths: a\nsize: on",
                "2:7: a size is such as 20g, and this is true",
            ),
            (
                "paths: a\nname: a b",
                "2:7: \"shop/a b\" is not a volume's name",
            ),
            ("paths: a\nsize: lots", "2:7: \"lots\" is not a size"),
            ("paths: a\nscope: all", "2:8: a scope is pipeline or global"),
            (
                "paths: a\ncommit: sometimes",
                "2:9: this must be one of on-success, always",
            ),
            (
                "paths: a\nread-only: maybe",
                "2:12: read-only is true or false",
            ),
            (
                "paths: a\nread-only: true\ncommit: always",
                "3:9: what is read-only commits nothing",
            ),
            ("paths: a\nlabels: k", "2:9: labels are a map"),
            ("paths: a\nparents: 'a@x'", "2:10: "),
            ("paths: 'a*b'", "1:8: \"a*b\" is a pattern"),
            (
                &format!("[{}]", "a,".repeat(300)),
                "1:1: this list has more than 256",
            ),
            (
                &format!("paths: [{}]", "a,".repeat(300)),
                "1:8: this list has more than 256",
            ),
            ("paths: $NONE", "1:8: the variable NONE is not set"),
            (
                "- {paths: a, name: x}\n- {paths: b, name: x}",
                "2:3: the volume shop/x is there twice",
            ),
        ] {
            let fault = said(text).unwrap_err();
            assert!(fault.starts_with(start), "{text:?}: {fault}");
        }
    }
}
