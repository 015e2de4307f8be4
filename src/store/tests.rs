use rocksdb::WriteBatch;

use super::*;
use crate::hostile::{assert_format, hex};
use crate::record;
use crate::tree::Source as _;

mod settle;

impl Store {
    /// Flips a bit of a stored chunk, as a bad disk does.
    pub(crate) fn damage_chunk(&self, id: ChunkId) {
        self.damage_stored(Target::Chunks, &id.0);
        self.chunks.clear();
    }

    /// Flips a bit of a stored node.
    pub(crate) fn damage_node(&self, id: NodeId) {
        self.damage_stored(Target::Nodes, &id.0);
        self.nodes.clear();
    }

    /// Lets a write fail: the database is opened again as it lies on the disk now.
    pub(crate) fn lose_what_is_not_flushed(&self) {
        self.copy_as_it_lies(&self.dir.join("left"));
        *self.poisoned.lock() = true;
    }

    /// The same, and has it opened again at once.
    pub(crate) fn lose_and_open_again(&self) {
        self.lose_what_is_not_flushed();
        self.heal().unwrap();
    }

    /// Puts what was left in the place of a database that has been closed.
    pub(super) fn take_what_was_left(&self) {
        let (db, left) = (self.dir.join("db"), self.dir.join("left/db"));
        if left.exists() {
            std::fs::remove_dir_all(&db).unwrap();
            std::fs::rename(left, db).unwrap();
        }
    }

    fn damage_stored(&self, target: Target, id: &[u8]) {
        let stored = self.with(|db| Ok(db.get_cf(family(db, target)?, id)?));
        let mut stored = stored.unwrap().unwrap();
        *stored.last_mut().unwrap() ^= 1;
        let mut batch = WriteBatch::default();
        self.put(&mut batch, target, id, &stored).unwrap();
        self.write_synced(batch).unwrap();
    }
}

fn open(dir: &Path) -> Result<Arc<Store>, StoreError> {
    Store::open(
        dir,
        StoreOptions {
            reserve: Some(0),
            ..StoreOptions::default()
        },
    )
}

#[test]
fn a_store_belongs_to_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let _store = open(dir.path()).unwrap();
    assert!(matches!(open(dir.path()), Err(StoreError::Locked { .. })));
}

#[test]
fn a_store_of_a_newer_format_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let mut batch = WriteBatch::default();
    store
        .put(&mut batch, Target::Meta, keys::FORMAT, &9_u32.to_be_bytes())
        .unwrap();
    store.write_synced(batch).unwrap();
    drop(store);
    assert!(matches!(
        open(dir.path()),
        Err(StoreError::Newer { found: 9, .. })
    ));
    assert!(matches!(
        open(dir.path()),
        Err(StoreError::Newer { found: 9, .. })
    ));
    // Where even the database is of a newer kind the file beside it says so.
    std::fs::write(dir.path().join("state"), "format 10\n").unwrap();
    std::fs::write(dir.path().join("db/CURRENT"), "newer").unwrap();
    assert!(matches!(
        open(dir.path()),
        Err(StoreError::Newer { found: 10, .. })
    ));
}

#[test]
fn a_folder_with_other_things_in_it_is_no_store() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.tex"), "x").unwrap();
    assert!(matches!(
        open(dir.path()),
        Err(StoreError::NotAStore { .. })
    ));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_store_whose_database_is_gone_is_never_replaced_by_an_empty_one() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    std::fs::remove_file(dir.path().join("db/CURRENT")).unwrap();
    let refused = |what: &str| {
        let error = open(dir.path()).err();
        assert!(
            matches!(error, Some(StoreError::Unreadable { .. })),
            "{what}"
        );
    };
    refused("CURRENT");
    assert!(!dir.path().join("db/CURRENT").exists());
    std::fs::remove_dir_all(dir.path().join("db")).unwrap();
    refused("the folder");
    assert!(!dir.path().join("db").exists());
}

#[test]
fn a_store_whose_making_was_cut_off_is_finished_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    std::fs::remove_file(dir.path().join("state")).unwrap();
    drop(open(dir.path()).unwrap());
    assert!(dir.path().join("state").exists());
}

#[test]
fn content_comes_back_verified_and_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let bytes = vec![3; 100_000];
    let first = Arc::new(store.ingest());
    let id = first.chunk(&bytes).unwrap();
    store
        .publish(std::slice::from_ref(&first), Publish::default())
        .unwrap();
    let again = store.ingest();
    assert_eq!(again.chunk(&bytes).unwrap(), id);
    assert_eq!(again.new_bytes(), 0);
    assert_eq!(&*store.chunk(id).unwrap(), &bytes[..]);
    store.damage_chunk(id);
    assert!(matches!(store.chunk(id), Err(StoreError::Corrupt { .. })));
    let nothing = ChunkId([1; 32]);
    assert!(matches!(
        store.chunk(nothing),
        Err(StoreError::Missing { .. })
    ));
}

#[test]
fn a_part_of_something_long_that_lies_in_a_spool_is_verified_and_does_not_stay_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let bytes = noise(1);
    let spool = dir.path().join("spool");
    std::fs::write(&spool, &bytes).unwrap();
    let id = ChunkId::of(&bytes);
    let len = bytes.len() as u64;
    let ingest = Arc::new(store.ingest());
    let place = Place {
        spool: 7,
        offset: 0,
        len,
    };
    ingest.lies(id, place).unwrap();
    store.keep_spool(ForkId(7), &spool).unwrap();
    ingest.keep(true);
    let packed = ingest.chunk(&[3; 5000]).unwrap();
    store.publish(&[ingest], Publish::default()).unwrap();

    let mut part = vec![0; bytes.len()];
    let done = store.chunk_to(id, &mut part).unwrap();
    assert!(matches!(done, Loaded::Filled) && part == bytes && store.chunks.is_empty());
    let chunk = |id, len| match store.chunk_to(id, &mut vec![0; len]) {
        Ok(Loaded::Chunk(chunk)) => chunk,
        other => panic!("{other:?}"),
    };
    // What is worth to be kept in memory, and what is there.
    assert_eq!(*chunk(packed, 5000), [3; 5000]);
    assert_eq!(store.chunks.len(), 1);
    for other in [0, bytes.len() - 1, bytes.len() + 1, bytes.len()] {
        assert!(*chunk(id, other) == bytes);
    }

    store.chunks.clear();
    let mut damaged = bytes;
    damaged[9] ^= 1;
    std::fs::write(&spool, &damaged).unwrap();
    let done = store.chunk_to(id, &mut part);
    assert!(matches!(done, Err(StoreError::Corrupt { .. })), "{done:?}");
}

#[test]
fn what_is_in_hand_is_never_collected() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let ingest = Arc::new(store.ingest());
    let id = ingest.chunk(&[1; 5000]).unwrap();
    store
        .publish(std::slice::from_ref(&ingest), Publish::default())
        .unwrap();
    assert_eq!(store.gc(false, no_roots).unwrap().removed_chunks, 0);
    drop(ingest);
    assert_eq!(store.gc(false, no_roots).unwrap().removed_chunks, 1);
    assert!(store.chunk(id).is_err());
}

#[test]
fn inode_numbers_are_given_once_and_again_when_nothing_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let id = ForkId(1);
    assert_eq!(store.lease_inodes(id, 64).unwrap(), 2..66);
    assert_eq!(store.lease_inodes(id, 128).unwrap(), 66..194);
    let over = Publish {
        forks: vec![ForkChange::Remove(id, 70..194)],
        ..Publish::default()
    };
    store.publish(&[], over).unwrap();
    // The next fork is abandoned by a process that never knew what it had leased.
    let id = ForkId(2);
    assert_eq!(store.lease_inodes(id, 64).unwrap(), 70..134);
    drop(store);
    let store = open(dir.path()).unwrap();
    store.remove_fork(id).unwrap();
    assert_eq!(store.lease_inodes(id, 64).unwrap(), 70..134);
    assert_eq!(store.lease_inodes(id, 1000).unwrap(), 134..194);
    assert_eq!(store.lease_inodes(id, 64).unwrap(), 194..258);
}

/// 200,000 bytes that do not compress.
fn noise(seed: u64) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let mut bytes = vec![0; 200_000];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn what_another_ingest_has_not_flushed_yet_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store")).unwrap();
    // A flush begins when the content is known to be on its way and not written yet.
    let (flushing, once) = (store.clone(), std::sync::Once::new());
    store.steps.meanwhile(move |step| {
        if step == Step::Spilling {
            once.call_once(|| flushing.flush().unwrap());
        }
    });
    let first = store.ingest();
    let ids: Vec<ChunkId> = (0..60).map(|n| first.chunk(&noise(n)).unwrap()).collect();
    store.steps.over();
    let second = Arc::new(store.ingest());
    assert_eq!(second.chunk(&noise(0)).unwrap(), ids[0]);
    store.publish(&[second], Publish::default()).unwrap();
    store.copy_as_it_lies(&dir.path().join("left"));
    let left = open(&dir.path().join("left")).unwrap();
    assert!(left.chunk(ids[1]).is_err(), "it was never flushed");
    assert_eq!(&*left.chunk(ids[0]).unwrap(), &noise(0)[..]);
}

#[test]
fn what_a_write_that_failed_has_done_comes_to_light_before_a_record_is_changed() {
    type Change = fn(&Store, u64);
    let changes: [Change; 3] = [
        |store, id| store.touch_volume(id, 9).unwrap(),
        |store, id| store.update_volume(id, |volume| volume.used = 9).unwrap(),
        |store, _| assert!(store.rename_volume("v", "w").unwrap()),
    ];
    for change in changes {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir.path().join("store")).unwrap();
        let id = store.create_volume("v", 1).unwrap().id;
        // The log has a new head, and memory the old one.
        store.update_volume(id, |volume| volume.head = 7).unwrap();
        store.copy_as_it_lies(&store.dir.join("left"));
        store.update_volume(id, |volume| volume.head = 0).unwrap();
        *store.poisoned.lock() = true;
        change(&store, id);
        assert_eq!(store.volume_by_id(id).unwrap().unwrap().head, 7);
    }
}

#[test]
fn what_could_not_be_written_ahead_is_written_once_when_there_is_room_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let contents: Vec<Vec<u8>> = (1..200).map(|seed| noise(seed).repeat(10)).collect();
    store.steps.fill(true);
    let ingest = store.ingest();
    assert!(contents.iter().any(|bytes| ingest.chunk(bytes).is_err()));
    drop(ingest);
    store.steps.fill(false);
    for is_new in [true, false] {
        let ingest = Arc::new(store.ingest());
        for bytes in &contents[..20] {
            ingest.chunk(bytes).unwrap();
        }
        assert_eq!(ingest.new_bytes() > 0, is_new);
        store.publish(&[ingest], Publish::default()).unwrap();
        store.flush().unwrap();
    }
}

#[test]
fn content_that_was_lost_with_a_failed_write_is_not_published() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = open(&path).unwrap();
    let put = |ingest: &Ingest| -> Vec<ChunkId> {
        let chunks = (0..60).map(|n| ingest.chunk(&noise(n)));
        chunks.collect::<Result<_, _>>().unwrap()
    };
    let first = Arc::new(store.ingest());
    let lost = put(&first);
    assert!(!first.is_lost());
    store.lose_what_is_not_flushed();
    let refused = store.publish(std::slice::from_ref(&first), Publish::default());
    assert!(matches!(refused, Err(StoreError::Lost)), "{refused:?}");
    assert!(first.is_lost());
    assert!(store.chunk(lost[0]).is_err());
    drop(first);
    let again = Arc::new(store.ingest());
    let ids = put(&again);
    store.publish(&[again], Publish::default()).unwrap();
    drop(store);
    let store = open(&path).unwrap();
    for id in ids {
        store.chunk(id).unwrap();
    }
}

/// A version with a content of these entries; returns it with its nodes.
fn version_of(store: &Arc<Store>, entries: &[(Vec<u8>, Vec<u8>)]) -> (Version, Vec<NodeId>) {
    let volume = store.create_volume("v", 1).unwrap();
    let ingest = Arc::new(store.ingest());
    let edits = entries.iter().cloned();
    let edits = edits.map(|(key, value)| (key, tree::Edit::Put(value)));
    let mut made = Vec::new();
    let empty = tree::empty().0;
    let root = tree::apply(&**store, empty, edits.collect(), &mut |id, bytes, node| {
        ingest.node(id, &bytes, node).unwrap();
        made.push(id);
    })
    .unwrap();
    let version = Version {
        volume: volume.id,
        number: 0,
        root,
        base: None,
        previous: 0,
        time: 1,
        job: None,
        labels: Default::default(),
        message: None,
        files: 0,
        logical_bytes: 0,
        blocks: 0,
        new_bytes: 0,
        has_acl: false,
        has_links: false,
        uid_map: None,
        excluded: LeftOut::default(),
    };
    let publish = Publish {
        versions: vec![version],
        ..Publish::default()
    };
    let versions = store
        .publish(std::slice::from_ref(&ingest), publish)
        .unwrap();
    (versions.into_iter().next().unwrap(), made)
}

/// A chunk that nothing holds in hand any more.
/// The caller of a gc knows of nothing that the store does not know.
fn no_roots() -> (Vec<NodeId>, ()) {
    (Vec::new(), ())
}

fn stored_chunk(store: &Arc<Store>, bytes: &[u8]) -> ChunkId {
    let ingest = Arc::new(store.ingest());
    let id = ingest.chunk(bytes).unwrap();
    store
        .publish(std::slice::from_ref(&ingest), Publish::default())
        .unwrap();
    id
}

fn content(ino: u64, id: ChunkId) -> (Vec<u8>, Vec<u8>) {
    let value = record::Value::Chunk { len: 5000, id };
    (record::content_key(record::Ino(ino), 0), value.encode())
}

#[test]
fn gc_keeps_all_that_can_be_read_of_a_version_that_was_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let first = stored_chunk(&store, &[1; 5000]);
    let last = stored_chunk(&store, &[2; 5000]);
    let mut entries = vec![content(2, first)];
    entries.extend((3..3000).map(|ino| {
        let value = record::Value::Inline(vec![ino as u8; 50]);
        (record::content_key(record::Ino(ino), 0), value.encode())
    }));
    entries.push(content(5000, last));
    let (version, nodes) = version_of(&store, &entries);
    let root = store.node(version.root).unwrap();
    assert!(root.level() > 0 && nodes.len() > 4);
    let mut leaf = root;
    let mut id = version.root;
    while leaf.level() > 0 {
        id = leaf.child(0).unwrap();
        leaf = store.node(id).unwrap();
    }
    store.damage_node(id);
    assert!(
        store.gc(false, no_roots).is_err(),
        "nobody has set it aside"
    );
    let at = version.at();
    store.set_aside(at, "a node is damaged").unwrap();
    store.gc(false, no_roots).unwrap();
    for node in nodes {
        assert!(node == id || store.load_node(node).is_ok(), "node {node}");
    }
    assert!(store.load_chunk(last).is_ok());
}

#[test]
fn gc_removes_nothing_when_an_entry_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let id = stored_chunk(&store, &[1; 5000]);
    let (key, mut value) = content(2, id);
    value[0] = 9;
    version_of(&store, &[(key, value)]);
    let error = store.gc(false, no_roots).unwrap_err().to_string();
    assert!(error.contains("an entry cannot be read"), "{error}");
    assert!(store.load_chunk(id).is_ok());
    let report = store.check().unwrap();
    assert_eq!(report.problems.len(), 1);
}

#[test]
fn the_format_of_stored_chunks_and_nodes_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let id = stored_chunk(&store, b"abc");
    let stored = |target: Target, id: &[u8]| {
        let found = store.with(|db| Ok(db.get_cf(family(db, target)?, id)?));
        found.unwrap().unwrap()
    };
    assert_format(
        "a stored chunk",
        &stored(Target::Chunks, &id.0),
        "00 03 616263",
    );
    assert_format(
        "the sizes of a chunk",
        &stored(Target::Sizes, &id.0),
        "03 05",
    );
    let empty = tree::empty().0;
    assert_format(
        "the empty map",
        &stored(Target::Nodes, &empty.0),
        "00 02 0000",
    );
    assert_eq!(FAMILIES, ["meta", "nodes", "chunks", "sizes"]);
    assert_eq!(stored_len(&hex("03 05")), Some((3, 5)));
}
