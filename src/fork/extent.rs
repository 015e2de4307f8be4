//! Where the content of a changed inode lies: an ordered list of extents, in pages, over what the base holds.
//!
//! A page that no extent covers is the base's below [`Content::base_pages`] and a hole above. The bytes of the last page behind
//! the file's size are undefined: whoever grows a file makes them zero first.

use std::collections::BTreeMap;

use crate::record::Ino;

/// The unit of extents, of room and of charge, in bytes.
pub const PAGE: u64 = 4096;

/// Returns the number of pages that `bytes` touch.
pub fn pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE)
}

/// Where a run of pages comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Page `at` of the spool and those behind it; `owned` by this inode alone and not frozen, so it may be written in place.
    Spool { at: u64, owned: bool },
    /// Page `page` of what the base has under `ino`, and those behind it.
    Base { ino: Ino, page: u64 },
    /// Reads as zeros; `reserved` ones are charged.
    Hole { reserved: bool },
}

impl Origin {
    fn advanced(self, pages: u64) -> Origin {
        match self {
            Origin::Spool { at, owned } => Origin::Spool {
                at: at + pages,
                owned,
            },
            Origin::Base { ino, page } => Origin::Base {
                ino,
                page: page + pages,
            },
            hole @ Origin::Hole { .. } => hole,
        }
    }
}

/// A run of pages of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    pub page: u64,
    pub pages: u64,
    pub origin: Origin,
}

impl Extent {
    /// The first page behind the extent.
    pub fn end(&self) -> u64 {
        self.page + self.pages
    }

    /// Returns the part of the extent within `[from, to)`, which must overlap it.
    pub fn slice(&self, from: u64, to: u64) -> Extent {
        let start = self.page.max(from);
        let end = self.end().min(to);
        Extent {
            page: start,
            pages: end - start,
            origin: self.origin.advanced(start - self.page),
        }
    }

    fn joins(&self, next: &Extent) -> bool {
        self.end() == next.page
            && match (self.origin, next.origin) {
                (Origin::Spool { .. }, Origin::Spool { .. })
                | (Origin::Base { .. }, Origin::Base { .. })
                | (Origin::Hole { .. }, Origin::Hole { .. }) => {
                    self.origin.advanced(self.pages) == next.origin
                }
                _ => false,
            }
    }
}

/// More extents than this are kept in a map, so that a write never moves a long list.
const LIST_MAX: usize = 48;

/// An ordered set of extents that do not overlap.
#[derive(Clone, Debug)]
pub enum ExtentMap {
    List(Vec<Extent>),
    Map(BTreeMap<u64, Extent>),
}

impl Default for ExtentMap {
    fn default() -> Self {
        ExtentMap::List(Vec::new())
    }
}

impl ExtentMap {
    /// The number of extents.
    pub fn len(&self) -> usize {
        match self {
            ExtentMap::List(list) => list.len(),
            ExtentMap::Map(map) => map.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns all extents in order.
    pub fn iter(&self) -> Box<dyn Iterator<Item = Extent> + '_> {
        match self {
            ExtentMap::List(list) => Box::new(list.iter().copied()),
            ExtentMap::Map(map) => Box::new(map.values().copied()),
        }
    }

    /// Returns the parts of extents within `[from, to)`, in order.
    pub fn within(&self, from: u64, to: u64) -> Vec<Extent> {
        if from >= to {
            return Vec::new();
        }
        let cut = |e: &Extent| e.slice(from, to);
        match self {
            ExtentMap::List(list) => {
                let start = list.partition_point(|e| e.end() <= from);
                list[start..]
                    .iter()
                    .take_while(|e| e.page < to)
                    .map(cut)
                    .collect()
            }
            ExtentMap::Map(map) => {
                let before = map
                    .range(..from)
                    .next_back()
                    .map(|(_, e)| e)
                    .filter(|e| e.end() > from);
                before
                    .into_iter()
                    .chain(map.range(from..to).map(|(_, e)| e))
                    .map(cut)
                    .collect()
            }
        }
    }

    /// Removes what lies in `[from, to)` and returns it.
    pub fn remove(&mut self, from: u64, to: u64) -> Vec<Extent> {
        let gone = self.within(from, to);
        if gone.is_empty() {
            return gone;
        }
        let keep = |e: &Extent| {
            let left = (e.page < from).then(|| e.slice(e.page, from));
            let right = (e.end() > to).then(|| e.slice(to, e.end()));
            left.into_iter().chain(right)
        };
        match self {
            ExtentMap::List(list) => {
                let start = list.partition_point(|e| e.end() <= from);
                let end = list.partition_point(|e| e.page < to);
                let rest: Vec<Extent> = list[start..end].iter().flat_map(keep).collect();
                list.splice(start..end, rest);
            }
            ExtentMap::Map(map) => {
                let mut keys: Vec<u64> = map.range(from..to).map(|(k, _)| *k).collect();
                keys.extend(
                    map.range(..from)
                        .next_back()
                        .filter(|(_, e)| e.end() > from)
                        .map(|(k, _)| *k),
                );
                for key in keys {
                    let old = map.remove(&key).expect("the key was just listed");
                    for part in keep(&old) {
                        map.insert(part.page, part);
                    }
                }
            }
        }
        gone
    }

    /// Puts an extent where none lies, joining it to its neighbours.
    pub fn insert(&mut self, mut extent: Extent) {
        match self {
            ExtentMap::List(list) => {
                let at = list.partition_point(|e| e.page < extent.page);
                if at < list.len() && extent.joins(&list[at]) {
                    extent.pages += list[at].pages;
                    list.remove(at);
                }
                if at > 0 && list[at - 1].joins(&extent) {
                    list[at - 1].pages += extent.pages;
                } else {
                    if list.is_empty() {
                        list.reserve_exact(1);
                    }
                    list.insert(at, extent);
                }
                if list.len() > LIST_MAX {
                    *self = ExtentMap::Map(list.drain(..).map(|e| (e.page, e)).collect());
                }
            }
            ExtentMap::Map(map) => {
                if let Some(next) = map.get(&extent.end()).copied()
                    && extent.joins(&next)
                {
                    map.remove(&next.page);
                    extent.pages += next.pages;
                }
                if let Some((_, before)) = map.range_mut(..extent.page).next_back()
                    && before.joins(&extent)
                {
                    before.pages += extent.pages;
                } else {
                    map.insert(extent.page, extent);
                }
            }
        }
    }

    /// Marks every extent in the spool as not owned: it is frozen, or another inode has it too.
    pub fn disown(&mut self, from: u64, to: u64) {
        for mut extent in self.remove(from, to) {
            if let Origin::Spool { at, .. } = extent.origin {
                extent.origin = Origin::Spool { at, owned: false };
            }
            self.insert(extent);
        }
    }
}

/// The content of a changed inode.
#[derive(Clone, Debug, Default)]
pub struct Content {
    pub extents: ExtentMap,
    /// Below this page a gap shows the base; from it on a gap is a hole.
    pub base_pages: u64,
    /// Raised by each change of content.
    pub sequence: u64,
    /// The first page that was changed since [`Content::mark`]; 0 if that was never called.
    changed_from: u64,
    /// The size up to which a frozen table below holds what this content had when it was copied from there.
    pub inherited_pages: u64,
}

/// What a page range of a file shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece {
    Extent(Extent),
    /// The base's own pages `[page, page + pages)` of the same inode.
    Base {
        page: u64,
        pages: u64,
    },
    Hole {
        page: u64,
        pages: u64,
    },
}

impl Content {
    /// The content of an inode that has what its base has, `size` bytes.
    pub fn of_base(size: u64) -> Content {
        Content {
            base_pages: pages(size),
            ..Content::default()
        }
    }

    /// Returns what `[from, to)` shows, without gaps, in order.
    pub fn pieces(&self, from: u64, to: u64) -> Vec<Piece> {
        let mut out = Vec::new();
        let mut at = from;
        for extent in self.extents.within(from, to) {
            self.gap(at, extent.page, &mut out);
            at = extent.end();
            out.push(match extent.origin {
                Origin::Hole { .. } => Piece::Hole {
                    page: extent.page,
                    pages: extent.pages,
                },
                _ => Piece::Extent(extent),
            });
        }
        self.gap(at, to, &mut out);
        out
    }

    /// Returns the byte of the spool from which on bytes `[from, to)` lie in a row, if they do.
    pub fn in_spool(&self, from: u64, to: u64) -> Option<u64> {
        let (first, end) = (from / PAGE, pages(to));
        let (mut start, mut next) = (None, first);
        for extent in self.extents.within(first, end) {
            let Origin::Spool { at, .. } = extent.origin else {
                return None;
            };
            let start = *start.get_or_insert(at);
            if extent.page != next || at != start + (next - first) {
                return None;
            }
            next = extent.end();
        }
        start
            .filter(|_| next == end)
            .map(|at| at * PAGE + from % PAGE)
    }

    fn gap(&self, from: u64, to: u64, out: &mut Vec<Piece>) {
        let base_end = to.min(self.base_pages).max(from);
        if from < base_end {
            out.push(Piece::Base {
                page: from,
                pages: base_end - from,
            });
        }
        if base_end < to {
            out.push(Piece::Hole {
                page: base_end,
                pages: to - base_end,
            });
        }
    }

    /// Says that page `page` changes, and maybe some behind it.
    pub fn touch(&mut self, page: u64) {
        self.sequence += 1;
        self.changed_from = self.changed_from.min(page);
    }

    /// Begins to note where it changes.
    pub fn mark(&mut self) {
        self.changed_from = u64::MAX;
    }

    /// The byte up to which nothing changed since it was marked.
    pub fn unchanged(&self) -> u64 {
        self.changed_from.saturating_mul(PAGE)
    }

    /// Puts `extent` in place of whatever was there; returns the extents that went.
    pub fn put(&mut self, extent: Extent) -> Vec<Extent> {
        self.touch(extent.page);
        let gone = self.extents.remove(extent.page, extent.end());
        self.extents.insert(extent);
        gone
    }

    /// Forgets everything from page `end` on; returns the extents that went. Growing again shows holes there.
    pub fn truncate(&mut self, end: u64) -> Vec<Extent> {
        self.touch(end);
        self.base_pages = self.base_pages.min(end);
        self.inherited_pages = self.inherited_pages.min(end);
        self.extents.remove(end, u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool(page: u64, pages: u64, at: u64) -> Extent {
        Extent {
            page,
            pages,
            origin: Origin::Spool { at, owned: true },
        }
    }

    #[test]
    fn writes_in_a_row_are_one_extent() {
        let mut content = Content::default();
        for n in 0..1000 {
            content.put(spool(n, 1, 100 + n));
        }
        assert_eq!(
            content.extents.iter().collect::<Vec<_>>(),
            [spool(0, 1000, 100)]
        );
    }

    #[test]
    fn bytes_lie_in_a_row_where_their_pages_do() {
        let mut content = Content::of_base(2 * PAGE);
        for extent in [spool(1, 4, 100), spool(5, 2, 104), spool(7, 2, 200)] {
            content.put(extent);
        }
        content.extents.disown(5, 6);
        assert_eq!(content.in_spool(PAGE + 5, 7 * PAGE), Some(100 * PAGE + 5));
        assert_eq!(content.in_spool(7 * PAGE, 9 * PAGE - 1), Some(200 * PAGE));
        for (from, to) in [(6 * PAGE, 8 * PAGE), (0, 2 * PAGE), (8 * PAGE, 10 * PAGE)] {
            assert_eq!(content.in_spool(from, to), None, "{from} to {to}");
        }
    }

    #[test]
    fn a_list_and_a_map_behave_alike_under_random_edits() {
        let mut seed = 7_u64;
        let mut model = vec![None; 600];
        let mut content = Content::default();
        for step in 0..5000_u64 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = (seed >> 33) % 590;
            let len = 1 + (seed >> 50) % 8;
            let at = step * 16;
            if seed.is_multiple_of(5) {
                content.extents.remove(page, page + len);
                model[page as usize..(page + len) as usize].fill(None);
            } else {
                content.put(spool(page, len, at));
                for n in 0..len {
                    model[(page + n) as usize] = Some(at + n);
                }
            }
            let mut shown = vec![None; 600];
            for e in content.extents.iter() {
                for n in 0..e.pages {
                    let Origin::Spool { at, .. } = e.origin else {
                        panic!("{e:?}")
                    };
                    assert!(
                        shown[(e.page + n) as usize].replace(at + n).is_none(),
                        "overlap"
                    );
                }
            }
            assert_eq!(shown, model, "step {step}");
        }
        assert!(matches!(content.extents, ExtentMap::Map(_)));
    }

    #[test]
    fn truncated_pages_come_back_as_holes_and_never_as_base() {
        let mut content = Content::of_base(10 * PAGE);
        assert_eq!(content.pieces(0, 10), [Piece::Base { page: 0, pages: 10 }]);
        content.truncate(4);
        assert_eq!(
            content.pieces(2, 8),
            [
                Piece::Base { page: 2, pages: 2 },
                Piece::Hole { page: 4, pages: 4 }
            ]
        );
    }
}
