//! One node: a run of entries, decoded for search, and its one encoding.
//!
//! `level ‖ count ‖ shared-prefix lengths ‖ suffix lengths ‖ value lengths ‖ suffixes ‖ values`, all numbers minimal varints.

use super::NodeId;
use crate::chunk::varint;

/// What is wrong with the bytes of a node, or with its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct TreeError(pub &'static str);

/// A node has no more bytes than this, whatever its entries: the hard cut, and one entry of the greatest weight. Nor have its
/// keys, written out.
pub const NODE_MAX: usize = 1 << 20;
/// No node lies higher: each but the last of its level has two children at least.
const LEVEL_MAX: u8 = 63;

/// A decoded node: keys and values in two arenas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    level: u8,
    keys: Vec<u8>,
    key_ends: Vec<u32>,
    values: Vec<u8>,
    value_ends: Vec<u32>,
}

impl Node {
    /// A node without entries.
    pub fn new(level: u8) -> Node {
        Node {
            level,
            keys: Vec::new(),
            key_ends: Vec::new(),
            values: Vec::new(),
            value_ends: Vec::new(),
        }
    }

    /// 0 for a leaf.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.key_ends.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.key_ends.is_empty()
    }

    /// The key of an entry.
    pub fn key(&self, at: usize) -> &[u8] {
        slice(&self.keys, &self.key_ends, at)
    }

    /// The value of an entry; above the leaves the id of a child.
    pub fn value(&self, at: usize) -> &[u8] {
        slice(&self.values, &self.value_ends, at)
    }

    /// The child that an entry of an inner node names.
    pub fn child(&self, at: usize) -> Result<NodeId, TreeError> {
        let id = self
            .value(at)
            .try_into()
            .map_err(|_| TreeError("a child is not named by an id"))?;
        Ok(NodeId(id))
    }

    /// Returns the first entry whose key is at least `key`.
    pub fn find(&self, key: &[u8]) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = (low + high) / 2;
            if self.key(middle) < key {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    /// Adds an entry behind all others.
    pub fn push(&mut self, key: &[u8], value: &[u8]) {
        self.keys.extend_from_slice(key);
        self.key_ends.push(self.keys.len() as u32);
        self.values.extend_from_slice(value);
        self.value_ends.push(self.values.len() as u32);
    }

    /// Bytes of memory that the node takes.
    pub fn weight(&self) -> usize {
        self.keys.capacity()
            + self.values.capacity()
            + (self.key_ends.capacity() + self.value_ends.capacity()) * 4
            + 128
    }

    /// Returns the one encoding of the node.
    pub fn encode(&self) -> Vec<u8> {
        let mut out =
            Vec::with_capacity(self.keys.len() / 2 + self.values.len() + self.len() * 3 + 8);
        out.push(self.level);
        varint::put(&mut out, self.len() as u64);
        let shared: Vec<usize> = (0..self.len()).map(|at| self.shared(at)).collect();
        for shared in &shared {
            varint::put(&mut out, *shared as u64);
        }
        for (at, shared) in shared.iter().enumerate() {
            varint::put(&mut out, (self.key(at).len() - shared) as u64);
        }
        for at in 0..self.len() {
            varint::put(&mut out, self.value(at).len() as u64);
        }
        for (at, shared) in shared.iter().enumerate() {
            out.extend_from_slice(&self.key(at)[*shared..]);
        }
        out.extend_from_slice(&self.values);
        out
    }

    /// The length of the prefix that a key shares with the one before it.
    fn shared(&self, at: usize) -> usize {
        match at.checked_sub(1) {
            None => 0,
            Some(before) => {
                let (a, b) = (self.key(before), self.key(at));
                a.iter().zip(b).take_while(|(x, y)| x == y).count()
            }
        }
    }

    /// Reads a node.
    ///
    /// # Errors
    /// What is wrong, if the bytes are not the one encoding of a node with ascending keys.
    pub fn decode(bytes: &[u8]) -> Result<Node, TreeError> {
        let short = TreeError("a node is cut off");
        if bytes.len() > NODE_MAX {
            return Err(TreeError("a node is longer than any can be"));
        }
        let (&level, mut rest) = bytes.split_first().ok_or(short)?;
        if level > LEVEL_MAX {
            return Err(TreeError("a node lies higher than any can"));
        }
        let count = varint::take(&mut rest).ok_or(short)?;
        // Three lengths of at least a byte each stand for every entry.
        let count = usize::try_from(count)
            .ok()
            .filter(|n| *n <= rest.len() / 3)
            .ok_or(short)?;
        let mut column = || -> Result<Vec<usize>, TreeError> {
            let mut out = Vec::with_capacity(count);
            for _ in 0..count {
                let len = varint::take(&mut rest).ok_or(short)?;
                out.push(
                    usize::try_from(len)
                        .ok()
                        .filter(|len| *len <= NODE_MAX)
                        .ok_or(short)?,
                );
            }
            Ok(out)
        };
        let (shared, suffixes, lengths) = (column()?, column()?, column()?);
        let mut node = Node::new(level);
        node.key_ends.reserve_exact(count);
        node.value_ends.reserve_exact(count);
        let mut last = 0..0;
        for (shared, suffix) in shared.iter().zip(&suffixes) {
            if *shared > last.len() {
                return Err(TreeError("a key shares more than the one before it has"));
            }
            let (suffix, after) = rest.split_at_checked(*suffix).ok_or(short)?;
            rest = after;
            let next = last.start + shared;
            let beyond = node.keys.get(next..last.end).and_then(|tail| tail.first());
            let ascends = match (beyond, suffix.first()) {
                (Some(a), Some(b)) => a < b,
                (None, Some(_)) => true,
                (_, None) => node.key_ends.is_empty() && last.is_empty(),
            };
            if !ascends {
                return Err(TreeError("keys do not ascend"));
            }
            if node.keys.len() + shared + suffix.len() > NODE_MAX {
                return Err(TreeError("keys are longer than any can be"));
            }
            let start = node.keys.len();
            node.keys.extend_from_within(last.start..next);
            node.keys.extend_from_slice(suffix);
            node.key_ends.push(node.keys.len() as u32);
            last = start..node.keys.len();
        }
        if lengths.iter().sum::<usize>() != rest.len() {
            return Err(TreeError("values do not fill the node"));
        }
        if level > 0 && (count == 0 || lengths.iter().any(|len| *len != 32)) {
            return Err(TreeError("an inner node holds something else than ids"));
        }
        let mut end = 0;
        for len in lengths {
            end += len as u32;
            node.value_ends.push(end);
        }
        node.keys.shrink_to_fit();
        node.values = rest.to_vec();
        Ok(node)
    }
}

fn slice<'a>(arena: &'a [u8], ends: &[u32], at: usize) -> &'a [u8] {
    let start = if at == 0 { 0 } else { ends[at - 1] as usize };
    &arena[start..ends[at] as usize]
}
