//! fsck: reads every node and chunk of every version from the disk and says which versions and paths damage hits.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::{NodeId, Store, StoreError, Target, Version, VersionRef, Volume};
use crate::chunk::ChunkId;
use crate::record::{self, Attr, Ino, Key, Kind, ROOT};
use crate::tree::{self, Node};

/// What a check found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CheckReport {
    pub versions: u64,
    pub nodes: u64,
    pub chunks: u64,
    /// Raw bytes read.
    pub bytes: u64,
    pub problems: Vec<Problem>,
}

/// One damage in one version; in none, with an empty name, where it is the store's own.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    pub volume: String,
    pub number: u64,
    pub what: String,
    /// The files it hits; empty where the tree itself is damaged.
    pub paths: Vec<String>,
    #[serde(skip)]
    pub at: Option<VersionRef>,
}

/// What was found whole, so that it is read once.
#[derive(Default)]
struct Whole {
    nodes: HashSet<NodeId>,
    chunks: HashSet<ChunkId>,
}

struct Walk<'a> {
    store: &'a Store,
    whole: &'a mut Whole,
    report: &'a mut CheckReport,
    volume: &'a Volume,
    version: &'a Version,
    names: Paths<'a>,
    /// Back references of the inode that is being read.
    links: Option<(Ino, Attr, u32)>,
    said: HashSet<(String, Vec<String>)>,
}

impl Store {
    /// Checks every version.
    ///
    /// # Errors
    /// What the disk answered; damage is no error but a problem of the report.
    pub fn check(&self) -> Result<CheckReport, StoreError> {
        let mut report = CheckReport::default();
        let mut whole = Whole::default();
        for volume in self.volumes()? {
            let versions = self.versions(volume.id)?;
            if volume.head != 0 && !versions.iter().any(|v| v.number == volume.head) {
                report.problems.push(Problem {
                    volume: volume.name.clone(),
                    number: volume.head,
                    what: "its head has no record".into(),
                    paths: Vec::new(),
                    at: None,
                });
            }
            for version in &versions {
                report.versions += 1;
                let mut walk = Walk {
                    store: self,
                    whole: &mut whole,
                    report: &mut report,
                    volume: &volume,
                    version,
                    names: Paths::new(self, version.root),
                    links: None,
                    said: HashSet::new(),
                };
                walk.node(version.root, None)?;
                walk.end_inode();
                // A retention or a command may have removed it meanwhile.
                let at = version.at();
                if report.problems.iter().any(|p| p.at == Some(at)) && self.version(at)?.is_none() {
                    report.problems.retain(|p| p.at != Some(at));
                }
            }
        }
        match self.read_index() {
            Ok(()) => {}
            Err(error @ (StoreError::Missing { .. } | StoreError::Corrupt { .. })) => {
                report.problems.push(Problem {
                    volume: String::new(),
                    number: 0,
                    what: format!("the index of chunks: {error}"),
                    paths: Vec::new(),
                    at: None,
                });
            }
            Err(error) => return Err(error),
        }
        Ok(report)
    }

    /// Reads all that says which chunks there are.
    fn read_index(&self) -> Result<(), StoreError> {
        let mut from = Vec::new();
        loop {
            let page = self.keys(Target::Sizes, &from, 10_000)?;
            let Some((last, _)) = page.last() else {
                return Ok(());
            };
            from = [&last[..], &[0]].concat();
        }
    }
}

impl Walk<'_> {
    fn problem(&mut self, what: String, paths: Vec<String>) {
        // A damaged file of the database hits many chunks in the same words.
        if !self.said.insert((what.clone(), paths.clone())) {
            return;
        }
        self.report.problems.push(Problem {
            volume: self.volume.name.clone(),
            number: self.version.number,
            what,
            paths,
            at: Some(self.version.at()),
        });
    }

    /// Returns whether everything below a node is whole.
    fn node(&mut self, id: NodeId, parent: Option<(&Node, usize)>) -> Result<bool, StoreError> {
        if self.whole.nodes.contains(&id) {
            // Some of the inode's names may lie in what is passed over.
            self.links = None;
            return Ok(true);
        }
        let node = match self.store.load_node(id) {
            Ok(node) => node,
            Err(error @ (StoreError::Missing { .. } | StoreError::Corrupt { .. })) => {
                self.problem(error.to_string(), Vec::new());
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        self.report.nodes += 1;
        if let Some((parent, at)) = parent
            && let Err(error) = tree::check_child(parent, at, &node)
        {
            self.problem(format!("node {id} ({error})"), Vec::new());
            return Ok(false);
        }
        let mut good = true;
        for at in 0..node.len() {
            if node.level() > 0 {
                good &= self.node(node.child(at)?, Some((&node, at)))?;
            } else {
                good &= self.entry(node.key(at), node.value(at))?;
            }
        }
        if good {
            self.whole.nodes.insert(id);
        }
        Ok(good)
    }

    fn entry(&mut self, key: &[u8], value: &[u8]) -> Result<bool, StoreError> {
        let valid = match Key::parse(key) {
            Some(Key::Attr(ino)) => {
                self.end_inode();
                match Attr::decode(value) {
                    Some(attr) => {
                        self.links = Some((ino, attr, 0));
                        true
                    }
                    None => false,
                }
            }
            Some(Key::Entry { hash, name, .. }) => {
                record::decode_entry(value).is_some() && record::hash56(name) == hash
            }
            Some(Key::Backref { ino, .. }) => {
                match self.links.as_mut() {
                    Some((at, _, count)) if *at == ino => *count += 1,
                    _ => {}
                }
                value.is_empty()
            }
            Some(Key::Xattr { .. } | Key::Content { .. }) => record::Value::decode(value).is_some(),
            None => false,
        };
        if !valid {
            self.problem(
                format!("the entry {} cannot be read", key.escape_ascii()),
                Vec::new(),
            );
            return Ok(false);
        }
        match record::chunk_refs(key, value)? {
            Some(id) => self.chunk(id, key),
            None => Ok(true),
        }
    }

    /// The links of a file must be as many as its names.
    fn end_inode(&mut self) {
        if let Some((ino, attr, names)) = self.links.take()
            && attr.kind != Kind::Directory
            && attr.nlink != names
        {
            let paths = self.paths(ino);
            self.problem(
                format!("inode {ino} has {names} names and says {}", attr.nlink),
                paths,
            );
        }
    }

    fn chunk(&mut self, id: ChunkId, key: &[u8]) -> Result<bool, StoreError> {
        if self.whole.chunks.contains(&id) {
            return Ok(true);
        }
        match self.store.load_chunk(id) {
            Ok(bytes) => {
                self.report.chunks += 1;
                self.report.bytes += bytes.len() as u64;
                self.whole.chunks.insert(id);
                Ok(true)
            }
            Err(error @ (StoreError::Missing { .. } | StoreError::Corrupt { .. })) => {
                let ino = match Key::parse(key) {
                    Some(Key::Content { ino, .. } | Key::Xattr { ino, .. }) => Some(ino),
                    _ => None,
                };
                let paths = ino.map(|ino| self.paths(ino)).unwrap_or_default();
                self.problem(error.to_string(), paths);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn paths(&mut self, ino: Ino) -> Vec<String> {
        self.names.of(ino).unwrap_or_default()
    }
}

/// The paths in one version. A folder is looked through once.
pub struct Paths<'a> {
    store: &'a Store,
    pub root: NodeId,
    /// Folders, with the one that each is in and its name there.
    places: HashMap<Ino, (Ino, String)>,
    listed: HashSet<Ino>,
}

impl<'a> Paths<'a> {
    pub fn new(store: &'a Store, root: NodeId) -> Paths<'a> {
        Paths {
            store,
            root,
            places: HashMap::new(),
            listed: HashSet::new(),
        }
    }

    /// Returns the paths of an inode, by its back references.
    pub fn of(&mut self, ino: Ino) -> Result<Vec<String>, StoreError> {
        let mut out = Vec::new();
        for item in tree::prefix(self.store, self.root, &record::backrefs_prefix(ino)) {
            let (key, _) = item?;
            if let Some(Key::Backref { parent, name, .. }) = Key::parse(&key) {
                let dir = self.of_folder(parent)?;
                out.push(format!("{dir}{}", String::from_utf8_lossy(name)));
            }
        }
        Ok(out)
    }

    /// Returns the path of a directory, with a slash at its end.
    pub fn of_folder(&mut self, dir: Ino) -> Result<String, StoreError> {
        let mut at = dir;
        let mut names: Vec<String> = Vec::new();
        // No path has more parts than this; a damaged tree may run in a circle.
        for _ in 0..4096 {
            if at == ROOT {
                break;
            }
            let Some((parent, name)) = self.place(at)? else {
                break;
            };
            names.push(name);
            at = parent;
        }
        names.reverse();
        let path = names.join("/");
        Ok(if path.is_empty() {
            "/".into()
        } else {
            format!("/{path}/")
        })
    }

    fn place(&mut self, dir: Ino) -> Result<Option<(Ino, String)>, StoreError> {
        if let Some(place) = self.places.get(&dir) {
            return Ok(Some(place.clone()));
        }
        let attr = tree::get(self.store, self.root, &record::attr_key(dir))?;
        let Some(attr) = attr.and_then(|value| Attr::decode(&value)) else {
            return Ok(None);
        };
        let parent = attr.parent;
        if self.listed.insert(parent) {
            for item in tree::prefix(self.store, self.root, &record::entries_prefix(parent)) {
                let (key, value) = item?;
                if let Some((child, Kind::Directory)) = record::decode_entry(&value)
                    && let Some(Key::Entry { name, .. }) = Key::parse(&key)
                {
                    let name = String::from_utf8_lossy(name).into_owned();
                    self.places.insert(child, (parent, name));
                }
            }
        }
        let nameless = || (parent, format!("#{dir}"));
        Ok(Some(
            self.places.entry(dir).or_insert_with(nameless).clone(),
        ))
    }
}
