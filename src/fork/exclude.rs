//! What a fork keeps to itself: paths that no version gets.
//!
//! An excluded name that the fork made or changed is taken out of what a seal hands on, with whatever only it leads to. What the
//! base has at such a place and the fork did not touch stays where it is.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};

use quick_cache::sync::Cache;

use super::error::FsError;
use super::table::{Cell, Edit, EntryKey, Inode, Name, Table};
use super::{Fork, Layers, view};
use crate::record::{self, Ino, Key, Kind, ROOT};
use crate::store::{LeftOut, Store};
use crate::sys;
use crate::tree;
use crate::volume::Patterns;

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
/// Paths that a version's record names; more are only counted.
const NAMED: usize = 100;

/// The patterns of a fork, in gitignore syntax, relative to the root of its volume.
#[derive(Clone, Debug)]
pub struct Excludes(Arc<Patterns>);

/// What was asked for, and what was made of it. Jobs ask for the same ones again and again, and are not to wait for them.
type Made = Cache<(Vec<String>, bool), Excludes>;

static MADE: LazyLock<Made> = LazyLock::new(|| Cache::new(32));

impl Excludes {
    /// Later patterns win over earlier ones, and over the default ones.
    ///
    /// # Errors
    /// Which pattern makes no sense.
    pub fn new(patterns: &[String], with_default: bool) -> Result<Excludes, String> {
        let wanted = (patterns.to_vec(), with_default);
        if let Some(made) = MADE.get(&wanted) {
            return Ok(made);
        }
        let default = if with_default { DEFAULT } else { &[] };
        let lines = default.iter().copied();
        let read = Patterns::of_paths(lines.chain(patterns.iter().map(String::as_str)))?;
        let made = Excludes(Arc::new(read));
        MADE.insert(wanted, made.clone());
        Ok(made)
    }

    /// Whether a pattern names this very path; what lies below an excluded folder is excluded too.
    fn names(&self, path: &[u8], is_dir: bool) -> bool {
        self.0.name(path, is_dir)
    }

    /// Whether a pattern may name a path that ends with the name of this hash.
    fn may_name(&self, hash: u64) -> bool {
        self.0.may_name(hash)
    }

    /// Whether it may matter to what lies below a folder of this path that it lies there.
    fn may_place_below(&self, path: &[u8]) -> bool {
        self.0.may_place_below(path)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What the default patterns mean for a folder of a volume, or for its root, that is put at `path`: tools keep credentials where
/// they do whichever part of the home the volume is, and at the top of each of its folders.
pub fn default_patterns_at(path: &Path, folder: Option<&str>, home: Option<&Path>) -> Vec<String> {
    let top = folder.map_or_else(String::new, |folder| format!("/{}", literal(folder)));
    let anchored: Vec<&str> = DEFAULT.iter().filter_map(|p| p.strip_prefix('/')).collect();
    let mut out = Vec::new();
    for place in anchored.iter().filter(|_| home != Some(path)) {
        let at = home.map(|home| home.join(place));
        match at.as_deref().and_then(|at| at.strip_prefix(path).ok()) {
            Some(rest) if rest.as_os_str().is_empty() => out.push(format!("{top}/*")),
            Some(rest) => {
                let slash = if place.ends_with('/') { "/" } else { "" };
                out.push(format!("{top}/{}{slash}", rest.display()));
            }
            None => {}
        }
    }
    if folder.is_some() {
        // Plain names, one by one: they are looked for by their last name alone.
        out.extend(anchored.iter().map(|place| format!("{top}/{place}")));
    }
    out
}

/// A name as a pattern that means nothing but it.
fn literal(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_punctuation() && !"._-".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
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

/// Takes what is excluded out of the live table, whose inodes of the base these are; `None` if that is nothing.
pub fn split(
    excludes: &Excludes,
    layers: &Layers,
    of_base: &[Arc<Cell>],
    store: &Store,
) -> Result<Option<Split>, FsError> {
    if excludes.is_empty() {
        return Ok(None);
    }
    let mut paths = Paths::new(excludes, store);
    let mut found = Names::new();
    paths.changed_names(layers, layers.live.entries.iter(), |_| true, &mut found)?;
    paths.base_names(layers, of_base.iter(), &mut found)?;
    paths.below_moved(layers, of_base, &mut found)?;
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
            && let Some(folder) = paths.folder(layers, *dir)?
        {
            let slash = if *kind == Kind::Directory { "/" } else { "" };
            let path = text(&join(&folder.path, name));
            left_out.paths.push(format!("{path}{slash}"));
        }
    }
    left_out.paths.sort_unstable();
    dropped.split(layers, store, left_out).map(Some)
}

/// Entries of a table that are looked at while others wait for it.
const SLICE: usize = 512;

/// Which of these inodes of the live table have an excluded name. It looks at a slice of the table at a time: what moves meanwhile
/// may be found in either place. `None` if it was told to give up.
///
/// # Errors
/// What the store answered.
pub fn excluded_inodes(
    fork: &Fork,
    cells: &[Arc<Cell>],
    give_up: impl Fn() -> bool,
) -> Result<Option<HashSet<Ino>>, FsError> {
    if fork.excludes.is_empty() {
        return Ok(Some(HashSet::new()));
    }
    let mut found = Names::new();
    let mut paths = Paths::new(&fork.excludes, &fork.store);
    let wanted: HashSet<Ino> = cells.iter().map(|cell| cell.ino).collect();
    let mut from: Bound<EntryKey> = Bound::Unbounded;
    loop {
        if give_up() {
            return Ok(None);
        }
        let next = sys::at_normal_priority(|| {
            let layers = fork.layers();
            let rest = layers.live.entries.range((from.clone(), Bound::Unbounded));
            let slice = || rest.clone().take(SLICE);
            let last = slice().last().map(|(key, _)| key.clone());
            paths.changed_names(&layers, slice(), |ino| wanted.contains(&ino), &mut found)?;
            Ok::<_, FsError>(last)
        })?;
        match next {
            Some(last) => from = Bound::Excluded(last),
            None => break,
        }
    }
    for slice in cells.chunks(SLICE) {
        if give_up() {
            return Ok(None);
        }
        sys::at_normal_priority(|| paths.base_names(&fork.layers(), slice.iter(), &mut found))?;
    }
    Ok(Some(found.into_values().map(|(ino, _)| ino).collect()))
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

/// The paths of what a fork shows. What was looked up once is believed from then on.
struct Paths<'a> {
    excludes: &'a Excludes,
    store: &'a Store,
    /// The folders in a folder, for those that were looked into.
    listed: HashMap<Ino, HashMap<Ino, Name>>,
    known: HashMap<Ino, Option<Rc<Folder>>>,
}

impl<'a> Paths<'a> {
    fn new(excludes: &'a Excludes, store: &'a Store) -> Paths<'a> {
        let root = Folder {
            path: Vec::new(),
            excluded: false,
        };
        Paths {
            excludes,
            store,
            listed: HashMap::new(),
            known: HashMap::from([(ROOT, Some(Rc::new(root)))]),
        }
    }

    /// Finds what is excluded among these entries of the live table, as far as it is wanted.
    fn changed_names<'e>(
        &mut self,
        layers: &Layers,
        entries: impl Iterator<Item = (&'e EntryKey, &'e Option<(Ino, Kind)>)>,
        wanted: impl Fn(Ino) -> bool,
        found: &mut Names,
    ) -> Result<(), FsError> {
        let root = layers.root.id;
        // The names of a folder stand together, and most of its names are passed over by their hash: whoever waits for a seal
        // waits for this.
        let mut folder: Option<(Ino, Option<Rc<Folder>>)> = None;
        for (key, child) in entries {
            let Some((ino, kind)) = *child else { continue };
            if !wanted(ino) {
                continue;
            }
            let dir = match folder.take().filter(|(at, _)| *at == key.0) {
                Some((_, dir)) => dir,
                None => self.folder(layers, key.0)?,
            };
            let excluded = self.is_excluded(dir.as_deref(), key, kind);
            folder = Some((key.0, dir));
            if !excluded {
                continue;
            }
            // A folder of the base in its old place stays with what it holds.
            let stays = kind == Kind::Directory
                && view::base_entry(self.store, root, key.0, key.1, &key.2)? == *child;
            if !stays {
                found.insert(key.clone(), (ino, kind));
            }
        }
        Ok(())
    }

    /// Finds the excluded names of the base that lead to these inodes of the live table.
    fn base_names<'c>(
        &mut self,
        layers: &Layers,
        cells: impl Iterator<Item = &'c Arc<Cell>>,
        found: &mut Names,
    ) -> Result<(), FsError> {
        for cell in cells {
            let kind = {
                let inode = cell.state.read();
                if !inode.is_of_base() || inode.orphan || inode.attr.kind == Kind::Directory {
                    continue;
                }
                inode.attr.kind
            };
            for item in tree::prefix(
                self.store,
                layers.root.id,
                &record::backrefs_prefix(cell.ino),
            ) {
                let (key, _) = item?;
                let Some(Key::Backref { parent, name, .. }) = Key::parse(&key) else {
                    continue;
                };
                let key: EntryKey = (parent, record::hash56(name), name.into());
                if layers.live.entries.contains_key(&key) {
                    continue;
                }
                let dir = self.folder(layers, parent)?;
                if self.is_excluded(dir.as_deref(), &key, kind) {
                    found.insert(key, (cell.ino, kind));
                }
            }
        }
        Ok(())
    }

    /// Finds what nobody touched and lies in an excluded place now, for a folder of the base above it has been moved.
    fn below_moved(
        &mut self,
        layers: &Layers,
        of_base: &[Arc<Cell>],
        found: &mut Names,
    ) -> Result<(), FsError> {
        let root = layers.root.id;
        let is_folder = |cell: &&Arc<Cell>| cell.state.read().attr.kind == Kind::Directory;
        let folders = of_base.iter().filter(is_folder).map(|cell| cell.ino);
        // One that is moved changes, if only its time.
        let changed: HashSet<Ino> = folders.collect();
        if changed.is_empty() {
            return Ok(());
        }
        for (key, child) in &layers.live.entries {
            let Some((ino, _)) = child.filter(|(ino, _)| changed.contains(ino)) else {
                continue;
            };
            if view::base_entry(self.store, root, key.0, key.1, &key.2)? == *child {
                continue;
            }
            let mut below = vec![ino];
            while let Some(dir) = below.pop() {
                let folder = self.folder(layers, dir)?;
                let matters =
                    |f: &Rc<Folder>| !f.excluded && self.excludes.may_place_below(&f.path);
                let Some(folder) = folder.filter(matters) else {
                    continue;
                };
                layers.list(self.store, dir, 0, |entry| {
                    let hash = record::hash56(&entry.name);
                    let (key, kind) = ((dir, hash, entry.name), entry.kind);
                    if self.is_excluded(Some(&folder), &key, kind) {
                        found.insert(key, (entry.ino, kind));
                    } else if kind == Kind::Directory {
                        below.push(entry.ino);
                    }
                    true
                })?;
            }
        }
        Ok(())
    }

    /// Whether a name in a folder is excluded, by itself or with all of the folder; in none that is gone.
    fn is_excluded(&self, dir: Option<&Folder>, (_, hash, name): &EntryKey, kind: Kind) -> bool {
        let is_dir = kind == Kind::Directory;
        dir.is_some_and(|dir| {
            dir.excluded
                || self.excludes.may_name(*hash)
                    && self.excludes.names(&join(&dir.path, name), is_dir)
        })
    }

    /// A folder by its number; `None` if it is gone.
    fn folder(&mut self, layers: &Layers, dir: Ino) -> Result<Option<Rc<Folder>>, FsError> {
        let mut chain = Vec::new();
        let mut at = dir;
        let mut above = loop {
            if let Some(known) = self.known.get(&at) {
                break known.clone();
            }
            let Some((parent, name)) = self.place(layers, at)? else {
                break None;
            };
            chain.push((at, name));
            at = parent;
        };
        for (ino, name) in chain.into_iter().rev() {
            above = above.map(|above| {
                let path = join(&above.path, &name);
                let may_be = self.excludes.may_name(record::hash56(&name));
                let excluded = above.excluded || may_be && self.excludes.names(&path, true);
                Rc::new(Folder { path, excluded })
            });
            self.known.insert(ino, above.clone());
        }
        Ok(above)
    }

    /// The folder and the name that a folder has.
    fn place(&mut self, layers: &Layers, dir: Ino) -> Result<Option<(Ino, Name)>, FsError> {
        let attr = layers.attr(self.store, dir)?;
        let Some(attr) = attr.filter(|attr| attr.nlink > 0) else {
            return Ok(None);
        };
        if !self.listed.contains_key(&attr.parent) {
            let mut folders = HashMap::new();
            layers.list(self.store, attr.parent, 0, |entry| {
                if entry.kind == Kind::Directory {
                    folders.insert(entry.ino, entry.name);
                }
                true
            })?;
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

    /// > Patterns are those of a `.gitignore` at the volume's root: later ones win, `!` takes one back.
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

    /// > `attach` and `run` look for them where a path begins too: `credentials.toml` in a volume that is put at `~/.cargo`,
    /// > `.npmrc` in each folder of a volume with several paths.
    #[test]
    fn the_default_ones_follow_a_volume_to_where_it_is_put() {
        let excluded = |path: &str, folder, name: &str, is_dir| {
            let home = Some(Path::new("/home/ci"));
            let patterns = default_patterns_at(Path::new(path), folder, home);
            Excludes::new(&patterns, true)
                .unwrap()
                .names(name.as_bytes(), is_dir)
        };
        for (path, folder, name, is_dir) in [
            ("/home/ci/.cargo", None, "credentials.toml", false),
            ("/home/ci/.docker", None, "config.json", false),
            ("/home/ci/.aws", None, "sso/cache", true),
            ("/home/ci/.ssh", None, "id_ed25519", false),
            (
                "/home/ci/.config",
                Some(".config"),
                ".config/gh/hosts.yml",
                false,
            ),
            (
                "/home/ci/.cargo",
                Some(".cargo"),
                ".cargo/credentials.toml",
                false,
            ),
            ("/build/a", Some("a{*}[,"), "a{*}[,/.npmrc", false),
            ("/build/a", Some("a"), "a/.ssh", true),
            ("/build/a", Some("a"), "a/.docker/config.json", false),
            ("/home/ci", None, ".npmrc", false),
        ] {
            assert!(
                excluded(path, folder, name, is_dir),
                "{path} {folder:?} {name}"
            );
        }
        for (path, folder, name, is_dir) in [
            ("/home/ci/.cargo", None, "config.toml", false),
            ("/build/a", None, "config.json", false),
            ("/home/ci/.docker2", None, "config.json", false),
            ("/build/a", Some("a"), "a/x/.npmrc", false),
            ("/build/a", Some("a*"), "ab/.npmrc", false),
            ("/build/a", Some("a"), "a/.ssh", false),
            ("/build/a", Some("a"), "a/.gnupg2", true),
        ] {
            assert!(
                !excluded(path, folder, name, is_dir),
                "{path} {folder:?} {name}"
            );
        }
        assert!(default_patterns_at(Path::new("/build/a"), None, None).is_empty());
    }

    /// > Nor is, unless the fork was made with `--no-default-exclude`, a path where tools keep credentials: `.netrc`,
    /// > `.git-credentials`, `/.npmrc`, `/.docker/config.json`, `/.cargo/credentials.toml`, `/.aws/credentials`, `/.ssh/`,
    /// > `/.gnupg/` and their like. A bare `*.pem`, `.env` and `.git/config` are no such paths.
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
            let hash = record::hash56(last.as_bytes());
            assert!(excludes.may_name(hash), "{patterns:?}");
        }
        let default = Excludes::new(&[], true).unwrap();
        let may_name = |name: &[u8]| default.may_name(record::hash56(name));
        assert!(!may_name(b"index.js") && may_name(b".netrc"));
    }

    #[test]
    fn the_default_ones_hit_credentials_and_not_certificates_or_settings() {
        for path in [
            ".npmrc",
            ".docker/config.json",
            ".cargo/credentials.toml",
            "x/.netrc",
            ".git-credentials",
            ".aws/credentials",
        ] {
            assert!(excluded(&[], true, path, false), "{path}");
        }
        assert!(excluded(&[], true, ".ssh", true) && excluded(&[], true, ".gnupg", true));
        for path in [
            "a.pem",
            ".env",
            ".git/config",
            "node_modules/x/.npmrc",
            ".config/pip/pip.conf",
        ] {
            assert!(!excluded(&[], true, path, false), "{path}");
        }
        assert!(!excluded(&["!/.npmrc"], true, ".npmrc", false));
        assert!(!excluded(&[], false, ".npmrc", false));
    }
}
