//! What a fork keeps to itself: paths that no version gets.
//!
//! An excluded name that the fork made or changed is taken out of what a seal hands on, with whatever only it leads to. What the
//! base has at such a place and the fork did not touch stays where it is.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::error::FsError;
use super::table::{Cell, Edit, EntryKey, Inode, Name, Table};
use super::{Layers, view};
use crate::record::{self, Ino, Key, Kind, ROOT};
use crate::store::{LeftOut, Store};
use crate::tree;

/// Where tools keep credentials below a home or workspace folder. Nothing here is a name that other files have too, for what is
/// left out is missing from the next fork.
const DEFAULT: &[&str] = &[
    ".git-credentials",
    ".netrc",
    "/.npmrc",
    "/.pypirc",
    "/.pgpass",
    "/.my.cnf",
    "/.s3cfg",
    "/.vault-token",
    "/.ssh/",
    "/.gnupg/",
    "/.aws/credentials",
    "/.aws/sso/cache/",
    "/.aws/cli/cache/",
    "/.azure/accessTokens.json",
    "/.azure/msal_token_cache.bin",
    "/.azure/msal_token_cache.json",
    "/.azure/service_principal_entries.bin",
    "/.azure/service_principal_entries.json",
    "/.cargo/credentials",
    "/.cargo/credentials.toml",
    "/.composer/auth.json",
    "/.config/composer/auth.json",
    "/.config/containers/auth.json",
    "/.config/gcloud/access_tokens.db",
    "/.config/gcloud/application_default_credentials.json",
    "/.config/gcloud/credentials.db",
    "/.config/gcloud/legacy_credentials/",
    "/.config/gh/hosts.yml",
    "/.config/git/credentials",
    "/.config/helm/registry/config.json",
    "/.config/rclone/rclone.conf",
    "/.docker/config.json",
    "/.gem/credentials",
    "/.kube/config",
    "/.m2/settings-security.xml",
    "/.terraform.d/credentials.tfrc.json",
];
/// The longest pattern: as long as a path may be.
const PATTERN_MAX: usize = 4096;
/// How deep the braces of a pattern may lie in each other. Each depth takes of the stack of whoever reads it.
const BRACES_MAX: usize = 32;
/// Paths that a version's record names; more are only counted.
const NAMED: usize = 100;

/// The patterns of a fork, in gitignore syntax, relative to the root of its volume.
#[derive(Clone, Debug)]
pub struct Excludes(Arc<Patterns>);

#[derive(Debug)]
struct Patterns {
    all: Gitignore,
    /// The only last names of a path that a pattern can name; `None` where one of them ends with more than a plain name. Whoever
    /// looks through many paths passes over most of them by that.
    last: Option<HashSet<Vec<u8>>>,
}

impl Patterns {
    fn new(lines: &[&str], all: Gitignore) -> Patterns {
        let last = lines.iter().filter(|line| !line.starts_with('#'));
        let last = last.map(|line| last_name(line)).collect();
        Patterns { all, last }
    }
}

/// The last name of what a pattern matches, if that is always the same one.
fn last_name(line: &str) -> Option<Vec<u8>> {
    let path = line.trim_end().trim_end_matches('/');
    let name = path.strip_prefix('!').unwrap_or(path);
    let name = name.rsplit('/').next().unwrap_or(name);
    // An empty one is no pattern, and names nothing.
    let plain = !path.contains(['*', '?', '[', ']', '{', '}', '\\']);
    plain.then(|| name.as_bytes().to_vec())
}

/// The default ones alone, made once: a fork is not to wait for them.
static DEFAULT_ONLY: OnceLock<Excludes> = OnceLock::new();

impl Excludes {
    /// Later patterns win over earlier ones, and over the default ones.
    ///
    /// # Errors
    /// Which pattern makes no sense.
    pub fn new(patterns: &[String], with_default: bool) -> Result<Excludes, String> {
        let default_only = patterns.is_empty() && with_default;
        if let Some(made) = DEFAULT_ONLY.get().filter(|_| default_only) {
            return Ok(made.clone());
        }
        let made = Excludes::build(patterns, with_default)?;
        if default_only {
            DEFAULT_ONLY.get_or_init(|| made.clone());
        }
        Ok(made)
    }

    fn build(patterns: &[String], with_default: bool) -> Result<Excludes, String> {
        let mut builder = GitignoreBuilder::new("/");
        let default = if with_default { DEFAULT } else { &[] };
        let lines: Vec<&str> = default
            .iter()
            .copied()
            .chain(patterns.iter().map(String::as_str))
            .collect();
        for line in &lines {
            if line.len() > PATTERN_MAX || depth(line) > BRACES_MAX {
                let start: String = line.chars().take(40).collect();
                return Err(format!(
                    "the pattern {start:?}… is longer or deeper than {PATTERN_MAX} bytes and {BRACES_MAX} braces"
                ));
            }
            let added = builder.add_line(None, line);
            added.map_err(|error| format!("the pattern {line:?}: {}", why(&error)))?;
        }
        let built = builder.build().map_err(|e| format!("the patterns: {e}"))?;
        Ok(Excludes(Arc::new(Patterns::new(&lines, built))))
    }

    /// Whether a pattern names this very path; what lies below an excluded folder is excluded too.
    fn names(&self, path: &[u8], is_dir: bool) -> bool {
        let path = Path::new(OsStr::from_bytes(path));
        self.0.all.matched(path, is_dir).is_ignore()
    }

    /// Whether a pattern may name a path that ends with this name.
    fn may_name(&self, name: &[u8]) -> bool {
        let last = self.0.last.as_ref();
        last.is_none_or(|last| last.contains(name))
    }

    fn is_empty(&self) -> bool {
        self.0.all.is_empty()
    }
}

/// How deep braces lie in each other.
fn depth(pattern: &str) -> usize {
    let (mut depth, mut most) = (0_usize, 0);
    for byte in pattern.bytes() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    most
}

/// Why a pattern is none, without the pattern as it is: that may hold any byte.
fn why(error: &ignore::Error) -> String {
    let text = match error {
        ignore::Error::Glob { err, .. } => err.clone(),
        other => other.to_string(),
    };
    text.escape_debug().to_string()
}

/// The live table of a fork taken apart.
pub struct Split {
    /// What goes into the version.
    pub committed: Table,
    pub left_out: LeftOut,
    /// The inodes that only the fork has from now on.
    pub kept: Vec<Arc<Cell>>,
    /// Their names, and the attributes of inodes that stay in the version with fewer links.
    pub edits: Vec<Edit>,
}

/// Takes what is excluded out of the live table; `None` if that is nothing.
pub fn split(
    excludes: &Excludes,
    layers: &Layers,
    store: &Store,
) -> Result<Option<Split>, FsError> {
    if excludes.is_empty() {
        return Ok(None);
    }
    let mut paths = Paths::new(excludes, layers, store);
    let found = paths.excluded(|_| true)?;
    if found.is_empty() {
        return Ok(None);
    }
    let dropped = Dropped::below(layers, store, &found)?;
    let mut left_out = LeftOut::default();
    for ((dir, _, name), (_, kind)) in &found {
        if dropped.dirs.contains(dir) {
            continue;
        }
        left_out.count += 1;
        if left_out.paths.len() < NAMED
            && let Some(folder) = paths.folder(*dir)?
        {
            let slash = if *kind == Kind::Directory { "/" } else { "" };
            let path = text(&join(&folder.path, name));
            left_out.paths.push(format!("{path}{slash}"));
        }
    }
    left_out.paths.sort_unstable();
    dropped.split(layers, store, left_out).map(Some)
}

/// The inodes among `wanted` that have an excluded name.
pub fn excluded_inodes(
    excludes: &Excludes,
    layers: &Layers,
    store: &Store,
    wanted: &HashSet<Ino>,
) -> Result<HashSet<Ino>, FsError> {
    if excludes.is_empty() {
        return Ok(HashSet::new());
    }
    let mut paths = Paths::new(excludes, layers, store);
    let found = paths.excluded(|ino| wanted.contains(&ino))?;
    Ok(found.into_values().map(|(ino, _)| ino).collect())
}

/// Names, with what they stand for.
type Names = BTreeMap<EntryKey, (Ino, Kind)>;

/// Everything that is left out.
struct Dropped {
    names: Names,
    dirs: BTreeSet<Ino>,
    /// How many names each non-directory loses.
    links: BTreeMap<Ino, u32>,
}

impl Dropped {
    /// The names found and everything below them.
    fn below(layers: &Layers, store: &Store, found: &Names) -> Result<Dropped, FsError> {
        let mut dropped = Dropped {
            names: Names::new(),
            dirs: BTreeSet::new(),
            links: BTreeMap::new(),
        };
        let mut next: Vec<(EntryKey, (Ino, Kind))> = found
            .iter()
            .map(|(key, child)| (key.clone(), *child))
            .collect();
        while let Some((key, (ino, kind))) = next.pop() {
            if dropped.names.insert(key, (ino, kind)).is_some() {
                continue;
            }
            if kind == Kind::Directory {
                dropped.dirs.insert(ino);
                layers.list(store, ino, 0, |entry| {
                    let hash = record::hash56(&entry.name);
                    next.push(((ino, hash, entry.name), (entry.ino, entry.kind)));
                    true
                })?;
            } else {
                *dropped.links.entry(ino).or_default() += 1;
            }
        }
        Ok(dropped)
    }

    fn split(self, layers: &Layers, store: &Store, left_out: LeftOut) -> Result<Split, FsError> {
        let root = layers.root.id;
        let cell = |ino: Ino| -> Result<Arc<Cell>, FsError> {
            if let Some(cell) = layers.live.inodes.get(&ino) {
                return Ok(cell.clone());
            }
            let attr = view::base_attr(store, root, ino)?.ok_or(FsError::Stale)?;
            Ok(Cell::new(ino, Inode::of_base(attr)))
        };
        // How many links of inodes that stay are only the fork's.
        let mut fewer: BTreeMap<Ino, u32> = BTreeMap::new();
        let mut gone = self.dirs.clone();
        for (ino, links) in &self.links {
            if cell(*ino)?.state.read().attr.nlink <= *links {
                gone.insert(*ino);
            } else {
                fewer.insert(*ino, *links);
            }
        }
        let mut committed = layers.live.clone();
        let mut kept = Vec::new();
        for ino in &gone {
            let is_new = view::base_attr(store, root, *ino)?.is_none();
            kept.push(cell(*ino)?);
            committed.remove(*ino, is_new);
        }
        let mut edits = Vec::new();
        for ((dir, hash, name), (ino, kind)) in &self.names {
            let child = Some((*ino, *kind));
            edits.push(Edit::Entry {
                dir: *dir,
                hash: *hash,
                name: name.clone(),
                child,
            });
            let below = view::base_entry(store, root, *dir, *hash, name)?;
            if !gone.contains(ino) && below == child {
                committed.unlinked.insert((*ino, *dir, name.clone()));
            }
            if gone.contains(dir) {
                continue;
            }
            let key = (*dir, *hash, name.clone());
            if below.is_some() {
                committed.entries.insert(key, None);
            } else {
                committed.entries.remove(&key);
            }
            if *kind == Kind::Directory {
                *fewer.entry(*dir).or_default() += 1;
            }
        }
        for (ino, links) in fewer {
            let mut inode = cell(ino)?.state.read().clone();
            let attr = inode.attr.clone();
            edits.push(Edit::Attr { ino, attr });
            inode.attr.nlink -= links;
            committed.inodes.insert(ino, Cell::new(ino, inode));
        }
        Ok(Split {
            committed,
            left_out,
            kept,
            edits,
        })
    }
}

/// A folder of the view: its path without a slash at either end, and whether it or one above it is excluded.
struct Folder {
    path: Vec<u8>,
    excluded: bool,
}

/// The paths of what a fork shows.
struct Paths<'a> {
    excludes: &'a Excludes,
    layers: &'a Layers,
    store: &'a Store,
    /// Where the folders are that the table names.
    moved: HashMap<Ino, (Ino, Name)>,
    /// The folders in a folder of the base, for those that were looked into.
    listed: HashMap<Ino, HashMap<Ino, Name>>,
    known: HashMap<Ino, Option<Rc<Folder>>>,
}

impl<'a> Paths<'a> {
    fn new(excludes: &'a Excludes, layers: &'a Layers, store: &'a Store) -> Paths<'a> {
        let moved = layers.live.entries.iter();
        let moved = moved.filter_map(|((dir, _, name), child)| match child {
            Some((ino, Kind::Directory)) => Some((*ino, (*dir, name.clone()))),
            _ => None,
        });
        let root = Folder {
            path: Vec::new(),
            excluded: false,
        };
        Paths {
            excludes,
            layers,
            store,
            moved: moved.collect(),
            listed: HashMap::new(),
            known: HashMap::from([(ROOT, Some(Rc::new(root)))]),
        }
    }

    /// The excluded names of inodes that the fork made or changed, as far as `wanted`.
    fn excluded(&mut self, wanted: impl Fn(Ino) -> bool) -> Result<Names, FsError> {
        let (live, root) = (&self.layers.live, self.layers.root.id);
        let mut found = Names::new();
        for (key, child) in &live.entries {
            let Some((ino, kind)) = *child else { continue };
            if !wanted(ino) || !self.is_excluded(key.0, &key.2, kind)? {
                continue;
            }
            // A folder of the base in its old place stays with what it holds.
            let stays = kind == Kind::Directory
                && view::base_entry(self.store, root, key.0, key.1, &key.2)? == *child;
            if !stays {
                found.insert(key.clone(), (ino, kind));
            }
        }
        // Names of the base that lead to what was changed.
        for cell in live.inodes.values().filter(|cell| wanted(cell.ino)) {
            let kind = {
                let inode = cell.state.read();
                let of_base = !inode.created || inode.base.is_some();
                if !of_base || inode.orphan || inode.attr.kind == Kind::Directory {
                    continue;
                }
                inode.attr.kind
            };
            for item in tree::prefix(self.store, root, &record::backrefs_prefix(cell.ino)) {
                let (key, _) = item?;
                let Some(Key::Backref { parent, name, .. }) = Key::parse(&key) else {
                    continue;
                };
                let key: EntryKey = (parent, record::hash56(name), name.into());
                if !live.entries.contains_key(&key) && self.is_excluded(parent, name, kind)? {
                    found.insert(key, (cell.ino, kind));
                }
            }
        }
        Ok(found)
    }

    fn is_excluded(&mut self, dir: Ino, name: &[u8], kind: Kind) -> Result<bool, FsError> {
        let Some(folder) = self.folder(dir)? else {
            return Ok(false);
        };
        let is_dir = kind == Kind::Directory;
        let named = || {
            self.excludes.may_name(name) && self.excludes.names(&join(&folder.path, name), is_dir)
        };
        Ok(folder.excluded || named())
    }

    /// A folder by its number; `None` if it is gone.
    fn folder(&mut self, dir: Ino) -> Result<Option<Rc<Folder>>, FsError> {
        let mut chain = Vec::new();
        let mut at = dir;
        let mut above = loop {
            if let Some(known) = self.known.get(&at) {
                break known.clone();
            }
            let Some((parent, name)) = self.place(at)? else {
                break None;
            };
            chain.push((at, name));
            at = parent;
        };
        for (ino, name) in chain.into_iter().rev() {
            above = above.map(|above| {
                let path = join(&above.path, &name);
                let named = self.excludes.may_name(&name) && self.excludes.names(&path, true);
                let excluded = above.excluded || named;
                Rc::new(Folder { path, excluded })
            });
            self.known.insert(ino, above.clone());
        }
        Ok(above)
    }

    /// The folder and the name that a folder has.
    fn place(&mut self, dir: Ino) -> Result<Option<(Ino, Name)>, FsError> {
        let attr = self.layers.attr(self.store, dir)?;
        let Some(attr) = attr.filter(|attr| attr.nlink > 0) else {
            return Ok(None);
        };
        if let Some(place) = self.moved.get(&dir) {
            return Ok(Some(place.clone()));
        }
        if !self.listed.contains_key(&attr.parent) {
            let mut folders = HashMap::new();
            let prefix = record::entries_prefix(attr.parent);
            for item in tree::prefix(self.store, self.layers.root.id, &prefix) {
                let (key, value) = item?;
                if let (Some(Key::Entry { name, .. }), Some((ino, Kind::Directory))) =
                    (Key::parse(&key), record::decode_entry(&value))
                {
                    folders.insert(ino, name.into());
                }
            }
            self.listed.insert(attr.parent, folders);
        }
        let name = self.listed[&attr.parent].get(&dir);
        Ok(name.map(|name| (attr.parent, name.clone())))
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() {
        name.to_vec()
    } else {
        [dir, b"/", name].concat()
    }
}

/// A path as a record names it: escaped where it is no text.
fn text(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(path) => path.into(),
        Err(_) => path.escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn excluded(patterns: &[&str], with_default: bool, path: &str, is_dir: bool) -> bool {
        let patterns: Vec<String> = patterns.iter().map(|p| (*p).to_owned()).collect();
        let excludes = Excludes::new(&patterns, with_default).unwrap();
        excludes.names(path.as_bytes(), is_dir)
    }

    #[test]
    fn patterns_are_those_of_gitignore_at_the_root_of_the_volume() {
        assert!(excluded(&["/a"], false, "a", false));
        assert!(!excluded(&["/a"], false, "b/a", false));
        assert!(excluded(&["*.o"], false, "b/a.o", false));
        assert!(excluded(&["tmp/"], false, "b/tmp", true));
        assert!(!excluded(&["tmp/"], false, "b/tmp", false));
        assert!(!excluded(&["*.o", "!keep.o"], false, "keep.o", false));
        assert!(Excludes::new(&["a{".into()], false).is_err());
    }

    #[test]
    fn no_path_that_a_pattern_names_is_passed_over_for_its_last_name() {
        for (patterns, path, is_dir) in [
            (&["/a/b/"][..], "a/b", true),
            (&["*.key"], "x/y.key", false),
            (&["a/**"], "a/b/c", false),
            (&["x", "{a,b/c}"], "b/c", false),
            (&["\\#x"], "#x", false),
            (&["#x", " y "], " y", false),
            (&["q\\ "], "q ", false),
            (&["k?y", "l"], "key", false),
            (&["[ab]", "l"], "d/b", false),
        ] {
            let patterns: Vec<String> = patterns.iter().map(|p| (*p).to_owned()).collect();
            let excludes = Excludes::new(&patterns, true).unwrap();
            assert!(excludes.names(path.as_bytes(), is_dir), "{path}");
            let last = path.rsplit('/').next().unwrap();
            assert!(excludes.may_name(last.as_bytes()), "{patterns:?}");
        }
        let default = Excludes::new(&[], true).unwrap();
        assert!(default.0.last.is_some() && !default.may_name(b"index.js"));
    }

    #[test]
    fn the_default_ones_hit_credentials_and_not_certificates_or_settings() {
        for path in [
            ".npmrc",
            ".docker/config.json",
            ".cargo/credentials.toml",
            "x/.netrc",
        ] {
            assert!(excluded(&[], true, path, false), "{path}");
        }
        assert!(excluded(&[], true, ".ssh", true));
        for path in [
            "a.pem",
            ".env",
            "node_modules/x/.npmrc",
            ".config/pip/pip.conf",
        ] {
            assert!(!excluded(&[], true, path, false), "{path}");
        }
        assert!(!excluded(&["!/.npmrc"], true, ".npmrc", false));
        assert!(!excluded(&[], false, ".npmrc", false));
    }
}
