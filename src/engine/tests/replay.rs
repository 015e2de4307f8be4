//! What a fork makes of a log that says anything at all.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::fork::log::Log;
use crate::fork::log::tests::any_edit;
use crate::fork::table::Edit;
use crate::store::Step;

/// Looks at everything that the fork shows and does not write.
fn look(fs: &Fs) -> std::result::Result<(), crate::fork::error::FsError> {
    for ino in (1..10).map(Ino) {
        let Ok(attr) = fs.getattr(ino) else { continue };
        let mut names = Vec::new();
        fs.readdir(ino, 0, |entry| {
            names.push(entry.name);
            names.len() < 100
        })
        .ok();
        for name in names {
            fs.lookup(ino, &name).ok();
        }
        if attr.kind == Kind::File {
            for offset in [0, attr.size / 2, attr.size.saturating_sub(100)] {
                fs.read(ino, offset, 4096).ok();
            }
            fs.lseek(ino, 0, crate::fs::Seek::Data).ok();
        }
        for name in fs.listxattr(ME, ino)?.split(|b| *b == 0) {
            fs.getxattr(ino, name).ok();
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_edits_are_replayed_or_refused(records in vec(vec(any_edit(), 1..6), 1..8)) {
        let mut bench = Bench::new();
        let id = bench.fork("v");
        put(&bench.fs(id), "file", b"content");
        let dir = bench.dir.path().join("store/forks").join(id.to_string());
        bench.engine().drain();
        let mut log = Log::replay(&dir, id.0, 1, |_, _: Vec<Edit>| {}).unwrap();
        for edits in &records {
            log.append(Request::default(), edits).unwrap();
        }
        drop(log);
        bench.reopen();
        // It may be lost; then it says so.
        if let Ok(fs) = bench.engine().fs_of(id) {
            look(&fs).ok();
        }
        bench.engine().abandon(id).unwrap();
        check(&bench);
    }
}

#[test]
fn a_file_of_many_pieces_whose_carrying_over_was_cut_off_is_whole() {
    let mut bench = Bench::copying();
    let id = bench.fork_with("v", |request| request.excludes = vec!["*.db".into()]);
    let fs = bench.fs(id);
    let ino = put(&fs, "pieces.db", b"");
    put(&fs, "plain", b"text");
    let pages = 120_000_u64;
    let bytes = |page: u64| (page + 1).to_le_bytes();
    // From behind, so that each page is an extent.
    for page in (0..pages).rev() {
        fs.write(ME, ino, page * 4096, &bytes(page), false).unwrap();
    }
    bench.engine().store.steps.cut(Step::Carried, 1);
    bench.engine().commit(vec![id], request(true)).unwrap_err();
    drop(fs);
    let segment = bench.engine().fork_dir(id).join("log-00000002");
    bench.close();
    let log = std::fs::read(&segment).unwrap();
    let header = 24;
    let first = u32::from_le_bytes(log[header..header + 4].try_into().unwrap());
    let end = header + 8 + first as usize;
    assert!(end < log.len(), "it is carried in several records");
    std::fs::write(&segment, &log[..end]).unwrap();
    bench.reopen();
    let fs = bench.fs(id);
    let lost = (0..pages).filter(|page| fs.read(ino, page * 4096, 8).unwrap() != bytes(*page));
    assert_eq!(lost.count(), 0);
}
