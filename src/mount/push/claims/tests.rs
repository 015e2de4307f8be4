use std::cell::Cell;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Claims;
use crate::fork::{Excludes, Fork, Origin};
use crate::fs::{Caller, Fs, NewNode, Options, Ownership};
use crate::record::{Ino, Kind, ROOT};
use crate::store::{ForkId, Store, StoreOptions};
use crate::sys::lent::Lent;
use crate::tree;

/// A session of a fork in which there is one file, which its kernel was told of once.
struct Bench {
    _dir: tempfile::TempDir,
    fs: Fs,
    file: Ino,
    claims: Claims,
    bytes: Arc<Lent>,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions {
            reserve: Some(0),
            ..StoreOptions::default()
        };
        let store = Store::open(&dir.path().join("store"), options).unwrap();
        let origin = Origin {
            id: ForkId(1),
            root: tree::empty().0,
            private: None,
            holds: (0, 0),
            first_segment: 1,
            has_links: false,
            size: 1 << 30,
            excludes: Excludes::new(&[], false).unwrap(),
        };
        let fork = Fork::create(store, &dir.path().join("fork"), origin, (0, 0), 0).unwrap();
        let options = Options {
            read_only: false,
            ownership: Ownership::Keep,
            acl: false,
        };
        let fs = Fs::new(Arc::new(fork), options);
        let fs = fs.for_session(1, ROOT, Arc::default()).unwrap();
        let file = NewNode::new(Kind::File, 0o644);
        let file = fs.make(Caller::default(), ROOT, b"f", file).unwrap().ino;
        Bench {
            _dir: dir,
            claims: Claims::new(fs.clone()),
            fs,
            file,
            bytes: Arc::new(Lent::new(10).unwrap()),
        }
    }

    /// Whether the file is pushed; what is due is answered behind it.
    fn push(&self, meanwhile: impl FnOnce()) -> bool {
        let store = |_: &[u8]| {
            meanwhile();
            Ok(())
        };
        let (pushed, answers) = self.claims.push(self.file, &self.bytes, 0..10, store);
        for answer in answers {
            answer();
        }
        pushed.unwrap()
    }

    /// The kernel drops the file from its memory, and looks it up once more.
    fn forget(&self) {
        self.fs.forget(self.file, 1);
        assert_eq!(self.fs.lookup(ROOT, b"f").unwrap().unwrap().ino, self.file);
    }
}

#[test]
fn a_file_is_pushed_once() {
    let bench = Bench::new();
    assert!(!bench.push(|| ()), "it was not fetched");
    assert!(bench.claims.fetch(bench.file));
    assert!(!bench.claims.fetch(bench.file), "it is on its way");
    assert!(bench.push(|| ()));
    assert!(!bench.claims.fetch(bench.file));
    bench.forget();
    assert!(bench.claims.fetch(bench.file));
    bench.claims.give_up(bench.file);
    assert!(bench.claims.fetch(bench.file));
    assert!(bench.push(|| bench.forget()));
    assert!(
        !bench.claims.fetch(bench.file),
        "it may have come to the new one"
    );
}

#[test]
fn what_was_fetched_before_the_file_was_read_or_changed_is_not_pushed_whatever_the_kernel_has_forgotten()
 {
    let changes: [fn(&Bench); 3] = [
        |bench| bench.claims.read(bench.file).unwrap(),
        |bench| bench.claims.before_change(bench.file, || ()),
        |bench| bench.claims.written(bench.file),
    ];
    for change in changes {
        let bench = Bench::new();
        assert!(bench.claims.fetch(bench.file));
        change(&bench);
        bench.forget();
        assert!(!bench.push(|| panic!("it was pushed")));
    }
}

#[test]
fn what_lets_the_kernel_change_a_file_is_answered_behind_a_push_of_it_and_at_once_else() {
    let bench = Bench::new();
    let answered = Arc::new(AtomicBool::new(false));
    let ask = |ino| {
        let answered = answered.clone();
        answered.store(false, Ordering::Relaxed);
        let answer = move || answered.store(true, Ordering::Relaxed);
        bench.claims.before_change(ino, answer);
    };
    ask(bench.file);
    assert!(answered.load(Ordering::Relaxed));
    bench.forget();
    assert!(bench.claims.fetch(bench.file));
    let pushed = bench.push(|| {
        ask(Ino(bench.file.0 + 1));
        assert!(answered.load(Ordering::Relaxed));
        ask(bench.file);
        assert!(!answered.load(Ordering::Relaxed));
    });
    assert!(pushed && answered.load(Ordering::Relaxed));
}

#[test]
fn a_read_takes_its_bytes_from_a_push() {
    let bench = Bench::new();
    assert!(bench.claims.fetch(bench.file));
    let refused = Cell::new(None);
    let (pushed, _) = bench.claims.push(bench.file, &bench.bytes, 0..10, |bytes| {
        bench.claims.read(bench.file).unwrap();
        let (_reader, mut kernel) = std::io::pipe()?;
        let done = kernel.write(bytes);
        refused.set(done.as_ref().err().and_then(|error| error.raw_os_error()));
        done.map(drop)
    });
    assert_eq!(refused.get(), Some(14), "EFAULT");
    assert!(!pushed.unwrap());
}

#[test]
fn nothing_is_pushed_once_it_is_closed_or_a_file_was_written_without_a_question() {
    let bench = Bench::new();
    assert!(bench.claims.fetch(bench.file));
    bench.claims.close(Duration::from_secs(20));
    assert!(!bench.push(|| panic!("it was pushed")));
    let bench = Bench::new();
    assert!(bench.claims.fetch(bench.file));
    // The kernel may never come back from it.
    let pushed = bench.push(|| bench.claims.close(Duration::from_millis(1)));
    assert!(pushed && !bench.claims.fetch(bench.file));
    let bench = Bench::new();
    bench.claims.written(bench.file);
    bench.forget();
    assert!(!bench.claims.fetch(bench.file));
}
