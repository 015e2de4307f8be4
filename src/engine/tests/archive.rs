//! Tar files, hostile ones above all.

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::faults::{kill, no_strays};
use super::*;
use crate::engine::archive::Imported;
use crate::hostile;
use crate::store::Step;

/// An entry: type, path, link target, content.
fn header(kind: EntryType, path: &str, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(5);
    header.set_size(size);
    header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_cksum();
    header
}

struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Tar {
        Tar(Builder::new(Vec::new()))
    }

    fn file(mut self, path: &str, content: &[u8]) -> Tar {
        let header = header(EntryType::Regular, path, content.len() as u64);
        self.0.append(&header, content).unwrap();
        self
    }

    fn other(mut self, kind: EntryType, path: &str, target: &str) -> Tar {
        let mut header = header(kind, path, 0);
        header.set_link_name_literal(target).unwrap();
        header.set_cksum();
        self.0.append(&header, std::io::empty()).unwrap();
        self
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Tar {
        self.0
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    fn raw(mut self, header: &Header, content: &[u8]) -> Tar {
        self.0.get_mut().extend_from_slice(header.as_bytes());
        self.0.get_mut().extend_from_slice(content);
        self
    }

    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn import(bench: &Bench, tar: &[u8]) -> Result<Imported> {
    bench.engine().import("v", &mut &tar[..], (0, 0))
}

/// Imports what must not be taken: the volume is as it was and no fork is left.
#[track_caller]
fn refused(bench: &Bench, tar: &[u8], why: &str) {
    let before = bench.engine().log("v").map(|log| log.len()).unwrap_or(0);
    let error = import(bench, tar).unwrap_err();
    assert_eq!(error.code, Code::Failed, "{error}");
    assert!(error.message.contains(why), "{error}");
    assert!(error.message.starts_with("the tar file: "), "{error}");
    assert_eq!(
        bench.engine().log("v").map(|log| log.len()).unwrap_or(0),
        before
    );
    assert_eq!(bench.engine().live_forks(), 0);
}

/// > An import takes a tar file whole or not at all: one without its end mark, with paths that lead out of it or through what is no
/// > folder, with links to nothing, or with sparse files in a PAX form before 1.0 is refused, and the volume stays as it was.
#[test]
fn paths_and_links_stay_in_the_volume() {
    let bench = Bench::new();
    let file = |path: &str| Tar::new().file(path, b"x").done();
    refused(&bench, &file("../out"), "../out: the path leads out of it");
    refused(&bench, &file("a/../../out"), "leads out of it");
    refused(
        &bench,
        &file("."),
        ".: the root is a folder and nothing else",
    );
    let through = Tar::new()
        .other(EntryType::Symlink, "link", "/etc")
        .file("link/passwd", b"x");
    refused(
        &bench,
        &through.done(),
        "link/passwd: the path goes through what is no folder",
    );
    let below = Tar::new().file("a", b"x").file("a/b", b"y");
    refused(&bench, &below.done(), "a/b: the path goes through");
    let links = [
        ("../../etc/passwd", "leads out of it"),
        ("/etc/passwd", "it is a link to nothing"),
        ("none", "hard: it is a link to nothing"),
        (".", "it is a link to nothing"),
    ];
    for (target, why) in links {
        let tar = Tar::new().other(EntryType::Link, "hard", target);
        refused(&bench, &tar.done(), why);
    }
    let folder =
        Tar::new()
            .other(EntryType::Directory, "d", "")
            .other(EntryType::Link, "hard", "d");
    refused(&bench, &folder.done(), "hard: it is a link to a folder");
    // An absolute path is one below the root of the volume.
    import(&bench, &file("/abs/file")).unwrap();
    let fs = bench.fs(bench.fork("v"));
    let folder = fs.lookup(ROOT, b"abs").unwrap().unwrap().ino;
    assert!(fs.lookup(folder, b"file").unwrap().is_some());
}

#[test]
fn the_last_of_several_entries_of_one_path_counts() {
    let bench = Bench::new();
    let tar = Tar::new()
        .file("a", b"old")
        .other(EntryType::Link, "b", "a")
        .other(EntryType::Link, "a", "a")
        .file("a", b"new")
        .other(EntryType::Directory, "d", "")
        .file("d/x", b"1")
        .other(EntryType::Directory, "d", "");
    import(&bench, &tar.done()).unwrap();
    let fs = bench.fs(bench.fork("v"));
    assert_eq!(get(&fs, "a"), Some(b"new".to_vec()));
    assert_eq!(get(&fs, "b"), Some(b"old".to_vec()));
    let folder = fs.lookup(ROOT, b"d").unwrap().unwrap().ino;
    assert!(fs.lookup(folder, b"x").unwrap().is_some());
}

/// > An import takes a tar file whole or not at all: one without its end mark, with paths that lead out of it or through what is no
/// > folder, with links to nothing, or with sparse files in a PAX form before 1.0 is refused, and the volume stays as it was.
#[test]
fn a_tar_file_that_is_cut_off_anywhere_is_refused() {
    let bench = Bench::new();
    let tar = Tar::new()
        .pax(&[("SCHILY.xattr.user.k", b"v")])
        .file("a", &noise(700, 1))
        .file("b", &[0; 512])
        .done();
    for end in (0..tar.len() - 1024)
        .step_by(256)
        .chain([1, tar.len() - 1025])
    {
        let error = import(&bench, &tar[..end]).unwrap_err();
        assert_eq!(error.code, Code::Failed, "{end} bytes: {error}");
    }
    let head = tar.len() - 1024 - 512 - 512;
    for end in [head + 1, head + 511] {
        refused(&bench, &tar[..end], "it is cut off");
    }
    refused(&bench, b"", "it has no end mark");
    assert!(import(&bench, &tar).unwrap().version.is_some());
}

/// > An import takes a tar file whole or not at all: one without its end mark, with paths that lead out of it or through what is no
/// > folder, with links to nothing, or with sparse files in a PAX form before 1.0 is refused, and the volume stays as it was.
#[test]
fn numbers_that_make_no_sense_are_refused_and_never_believed() {
    let bench = Bench::new();
    for (key, value, why) in [
        ("uid", "-1", "f: its PAX record uid is no number"),
        ("uid", "4294967295", "f: its uid is out of range"),
        (
            "gid",
            "99999999999999999999",
            "its PAX record gid is no number",
        ),
        ("size", "1x", "its PAX record size is no number"),
        (
            "GNU.sparse.major",
            "1",
            "sparse files in an older PAX form cannot be read",
        ),
    ] {
        let tar = Tar::new().pax(&[(key, value.as_bytes())]).file("f", b"x");
        refused(&bench, &tar.done(), why);
    }
    for size in [u64::MAX, u64::MAX - 511, 1 << 62, 1 << 40] {
        let tar = Tar::new().raw(&header(EntryType::Regular, "f", size), &[1; 512]);
        let error = import(&bench, &tar.done()).unwrap_err();
        assert_eq!(error.code, Code::Failed, "{size}: {error}");
    }
    let mut device = header(EntryType::Char, "dev", 0);
    device.set_device_major(0o7_777_777).unwrap();
    device.set_device_minor(1).unwrap();
    device.set_cksum();
    refused(
        &bench,
        &Tar::new().raw(&device, b"").done(),
        "dev: its device numbers are out of range",
    );
    // A time that no file can have is told, and the file is kept.
    let tar = Tar::new()
        .pax(&[("mtime", b"99999999999999")])
        .file("f", b"x");
    let imported = import(&bench, &tar.done()).unwrap();
    assert_eq!(imported.warnings, ["f: its time cannot be kept"]);
    let tar = Tar::new()
        .other(EntryType::new(b'Z'), "z", "")
        .other(EntryType::new(1), "one", "");
    let imported = import(&bench, &tar.done()).unwrap();
    let said = |path, kind| format!("{path}: entries of type '{kind}' cannot be kept");
    assert_eq!(imported.warnings, [said("z", "Z"), said("one", "\\x01")]);
}

/// > | holes of sparse files in a tar file, in the form before PAX | 1 TiB in all | import is refused |
#[test]
fn a_sparse_file_takes_no_more_time_or_room_than_its_data() {
    let bench = Bench::new();
    let sparse = |real: u64, blocks: &[(u64, u64)], content: &[u8]| {
        let mut header = header(EntryType::GNUSparse, "s", content.len() as u64);
        let gnu = header.as_gnu_mut().unwrap();
        for (block, (offset, length)) in gnu.sparse.iter_mut().zip(blocks) {
            block.offset = field(*offset);
            block.numbytes = field(*length);
        }
        gnu.realsize = field(real);
        header.set_cksum();
        Tar::new().raw(&header, content).done()
    };
    let huge = sparse(1 << 60, &[(1 << 60, 0)], b"");
    refused(
        &bench,
        &huge,
        "s: its sparse files have holes of more than 1 TiB",
    );
    let lying = sparse(10_000, &[(0, 512), (100, 512)], &[1; 1024]);
    assert_eq!(import(&bench, &lying).unwrap_err().code, Code::Failed);
    let end = 64 << 20;
    import(
        &bench,
        &sparse(end + 512, &[(4096, 512), (end, 512)], &[7; 1024]),
    )
    .unwrap();
    let fs = bench.fs(bench.fork("v"));
    let ino = fs.lookup(ROOT, b"s").unwrap().unwrap().ino;
    let attr = fs.getattr(ino).unwrap();
    assert_eq!((attr.size, attr.blocks), (end + 512, 16));
    let mut expected = vec![0; end as usize + 512];
    expected[4096..4608].fill(7);
    expected[end as usize..].fill(7);
    assert!(get(&fs, "s").unwrap() == expected);
}

/// > An export leaves the holes of a file out where they are 64 KiB or more, in the PAX form 1.0 that tar programs read; an import
/// > brings them back.
#[test]
fn holes_are_left_out_of_a_tar_file_and_come_back() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let files: [(&str, u64, &[u64]); 7] = [
        ("huge", 3 << 40, &[0, 1 << 40, (3 << 40) - 9]),
        ("hole", 1 << 20, &[]),
        ("ends in a hole", 300_000, &[5000]),
        ("begins with one", 300_000, &[299_991]),
        ("little", 65_536, &[0]),
        ("just enough", 69_632, &[0]),
        ("part of a page", 65_537, &[]),
    ];
    for (name, size, data) in files {
        let file = put(&fs, name, b"");
        for at in data {
            fs.write(ME, file, *at, b"some data", false).unwrap();
        }
        let size = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        fs.setattr(ME, file, size).unwrap();
    }
    let file = fs.lookup(ROOT, b"huge").unwrap().unwrap().ino;
    fs.link(ME, file, ROOT, b"hard").unwrap();
    bench.commit(id, false);
    let mut tar = Vec::new();
    bench.engine().export("v", &mut tar).unwrap();
    assert!(tar.len() < 160_000, "{} bytes", tar.len());
    bench.engine().import("w", &mut &tar[..], (0, 0)).unwrap();

    let (v, w) = (bench.fs(bench.fork("v")), bench.fs(bench.fork("w")));
    for (name, size, data) in files {
        let [v, w] = [&v, &w].map(|fs| fs.lookup(ROOT, name.as_bytes()).unwrap().unwrap());
        assert_eq!((w.attr.size, w.attr.mtime), (size, v.attr.mtime), "{name}");
        // Of the little ones holes become data.
        if name != "little" {
            assert_eq!(w.attr.blocks, v.attr.blocks, "{name}");
        }
        let fs = bench.fs(bench.fork("w"));
        for at in data {
            assert_eq!(fs.read(w.ino, *at, 9).unwrap(), b"some data", "{name}");
        }
    }
    let hard = w.lookup(ROOT, b"hard").unwrap().unwrap();
    assert_eq!(hard.ino, w.lookup(ROOT, b"huge").unwrap().unwrap().ino);
}

#[test]
fn gnu_tar_reads_the_holes_that_are_written_and_writes_those_that_are_read() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let file = put(&fs, "file", &noise(10_000, 1));
    fs.write(ME, file, 5_000_000, &noise(10_000, 2), false)
        .unwrap();
    let end = put(&fs, "end", &noise(5_000, 3));
    let size = SetAttr {
        size: Some(1 << 30),
        ..SetAttr::default()
    };
    fs.setattr(ME, end, size).unwrap();
    let content = get(&fs, "file").unwrap();
    bench.commit(id, false);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tar");
    let mut out = std::fs::File::create(&path).unwrap();
    bench.engine().export("v", &mut out).unwrap();
    let tar = |args: &[&str]| {
        let mut command = std::process::Command::new("tar");
        let status = command.current_dir(dir.path()).args(args).status();
        assert!(status.unwrap().success(), "{args:?}");
    };
    std::fs::create_dir(dir.path().join("d")).unwrap();
    tar(&["xf", "tar", "-C", "d"]);
    assert!(std::fs::read(dir.path().join("d/file")).unwrap() == content);
    let unpacked = std::fs::File::open(dir.path().join("d/end")).unwrap();
    assert_eq!(unpacked.metadata().unwrap().len(), 1 << 30);
    let mut start = vec![0; 6000];
    std::os::unix::fs::FileExt::read_exact_at(&unpacked, &mut start, 0).unwrap();
    assert_eq!(start, [noise(5_000, 3), vec![0; 1000]].concat());

    tar(&["cSf", "tar", "--format=posix", "-C", "d", "."]);
    let mut input = std::fs::File::open(&path).unwrap();
    assert!(input.metadata().unwrap().len() < 1 << 20);
    bench.engine().import("w", &mut input, (0, 0)).unwrap();
    let fs = bench.fs(bench.fork("w"));
    assert!(get(&fs, "file").unwrap() == content);
    let end = fs.lookup(ROOT, b"end").unwrap().unwrap();
    assert_eq!((end.attr.size, end.attr.blocks), (1 << 30, 16));
    assert_eq!(fs.read(end.ino, 0, 6000).unwrap(), start);
}

#[test]
fn a_map_of_holes_that_makes_no_sense_is_refused() {
    let bench = Bench::new();
    let sparse = |size: &str, map: &str, data: usize| {
        let mut content = map.as_bytes().to_vec();
        content.resize(content.len().next_multiple_of(512), 0);
        content.resize(content.len() + data, 7);
        let records = [
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"d/s"),
            ("GNU.sparse.realsize", size.as_bytes()),
        ];
        Tar::new().pax(&records).file("s", &content).done()
    };
    for (map, data) in [
        ("2\n0\n512\n100\n512\n", 1024),
        ("2\n4096\n512\n0\n512\n", 1024),
        ("1\n9999\n2\n", 2),
        ("1\n10001\n0\n", 0),
        ("1\n18446744073709551615\n2\n", 2),
        ("1\n0\n18446744073709551616\n", 2),
        ("18446744073709551615\n0\n1\n", 1),
        ("1\n-1\n1\n", 1),
        ("1\n0 1\n", 1),
        ("\n", 0),
        ("1\n0\n", 512),
    ] {
        let why = "d/s: where its data lies makes no sense";
        refused(&bench, &sparse("10000", map, data), why);
    }
    let zeros = "0".repeat(17 << 20);
    refused(&bench, &sparse("10000", &zeros, 0), "longer than 16 MiB");
    refused(
        &bench,
        &sparse("10000", &"0".repeat(512), 0),
        "d/s: the content is cut off",
    );
    refused(
        &bench,
        &sparse("10000", "1\n0\n512\n", 511),
        "said in two ways",
    );
    refused(
        &bench,
        &sparse("10000", "1\n0\n512\n", 600),
        "said in two ways",
    );
    refused(
        &bench,
        &sparse("x", "0\n", 0),
        "GNU.sparse.realsize is no number",
    );
    let error = import(&bench, &sparse("18446744073709551615", "0\n", 0)).unwrap_err();
    assert!(error.message.contains("too large"), "{error}");
    import(&bench, &sparse("10000", "2\n10\n2\n9998\n2\n", 4)).unwrap();
    let fs = bench.fs(bench.fork("v"));
    let folder = fs.lookup(ROOT, b"d").unwrap().unwrap().ino;
    let file = fs.lookup(folder, b"s").unwrap().unwrap();
    assert_eq!((file.attr.size, file.attr.blocks), (10_000, 16));
    assert_eq!(fs.read(file.ino, 9, 4).unwrap(), [0, 7, 7, 0]);
    assert_eq!(fs.read(file.ino, 9996, 9).unwrap(), [0, 0, 7, 7]);
}

/// A number as GNU tar writes large ones too.
fn field(number: u64) -> [u8; 12] {
    let mut field = [0; 12];
    field[0] = 0x80;
    field[4..].copy_from_slice(&number.to_be_bytes());
    field
}

/// > | a path in a tar file | 64 KiB | import is refused |
/// > | what a tar file says of one entry: names, attributes | 16 MiB | import is refused |
#[test]
fn what_an_entry_says_of_itself_has_a_bound() {
    let bench = Bench::new();
    for kind in [
        EntryType::XHeader,
        EntryType::GNULongName,
        EntryType::GNULongLink,
    ] {
        // More than is ever read: it comes from a source that has no end.
        let head = header(kind, "x", 1 << 50);
        let mut endless = std::io::Read::chain(&head.as_bytes()[..], std::io::repeat(b'a'));
        let error = bench
            .engine()
            .import("v", &mut endless, (0, 0))
            .unwrap_err();
        assert!(error.message.contains("longer than 16 MiB"), "{error}");
    }
    let deep = "a/".repeat(40_000);
    let tar = Tar::new().pax(&[("path", deep.as_bytes())]).file("f", b"");
    refused(&bench, &tar.done(), "the path is longer than 64 KiB");
    let name = "n".repeat(256);
    let tar = Tar::new().pax(&[("path", name.as_bytes())]).file("f", b"");
    assert!(
        import(&bench, &tar.done())
            .unwrap_err()
            .message
            .contains("name too long")
    );
    for path in [&b"a\0b"[..], b"\0"] {
        let tar = Tar::new().pax(&[("path", path)]).file("f", b"");
        assert!(
            import(&bench, &tar.done())
                .unwrap_err()
                .message
                .contains("invalid argument")
        );
    }
    let tar = Tar::new()
        .pax(&[("SCHILY.xattr.user.a\0b", b"v")])
        .file("f", b"");
    assert!(import(&bench, &tar.done()).is_err());
}

#[test]
fn a_newline_in_a_record_hides_no_other_record() {
    let bench = Bench::new();
    let value = b"1\n20 path=../../evil\n11 uid=1234\n12 size=9999\n";
    let tar = Tar::new()
        .pax(&[("SCHILY.xattr.user.k", value), ("uid", b"7")])
        .file("f", b"x");
    import(&bench, &tar.done()).unwrap();
    let fs = bench.fs(bench.fork("v"));
    let ino = fs.lookup(ROOT, b"f").unwrap().unwrap().ino;
    assert_eq!(fs.getxattr(ino, b"user.k").unwrap(), value);
    assert_eq!(fs.getattr(ino).unwrap().uid, 7);
}

#[test]
fn names_and_values_of_any_bytes_survive_export_and_import() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let file = put(&fs, "a\nb = c", b"x");
    for (name, value) in [
        (&b"user.a=b%3Dc%"[..], &b"\n\n1 x=y\n"[..]),
        (b"user.empty", b""),
    ] {
        fs.setxattr(ME, file, name, value, XattrMode::Any).unwrap();
    }
    fs.setxattr(ME, file, b"user.\xff", b"1", XattrMode::Any)
        .unwrap();
    let node = NewNode {
        target: b"to\n17 path=evil\n",
        ..NewNode::new(Kind::Symlink, 0)
    };
    fs.make(ME, ROOT, b"link", node).unwrap();
    bench.commit(id, false);
    let mut tar = Vec::new();
    let warnings = bench.engine().export("v", &mut tar).unwrap();
    assert_eq!(
        warnings,
        ["./a\nb = c: the attribute user.\\xff cannot be kept"]
    );
    let imported = bench.engine().import("w", &mut &tar[..], (0, 0)).unwrap();
    assert!(imported.warnings.is_empty(), "{:?}", imported.warnings);
    let fs = bench.fs(bench.fork("w"));
    let file = fs.lookup(ROOT, b"a\nb = c").unwrap().unwrap().ino;
    assert_eq!(fs.getxattr(file, b"user.a=b%3Dc%").unwrap(), b"\n\n1 x=y\n");
    assert_eq!(fs.getxattr(file, b"user.empty").unwrap(), b"");
    let list = bench.engine().ls("w", b"/").unwrap();
    let link = list.iter().find(|entry| entry.name == b"link").unwrap();
    assert_eq!(link.target.as_deref(), Some(node.target));
}

#[test]
fn folders_deeper_than_a_stack_are_exported_compared_and_removed() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let mut dir = ROOT;
    for _ in 0..4000 {
        let node = NewNode::new(Kind::Directory, 0o755);
        dir = fs.make(ME, dir, b"d", node).unwrap().ino;
    }
    bench.commit(id, false);
    bench
        .engine()
        .import("w", &mut &Tar::new().done()[..], (0, 0))
        .unwrap();
    let engine = bench.engine().clone();
    // As little room as a thread may have.
    let small = std::thread::Builder::new().stack_size(256 << 10);
    let all = small.spawn(move || {
        engine.export("v", &mut std::io::sink()).unwrap();
        assert_eq!(engine.diff("w", "v").unwrap().len(), 4000);
        engine
            .import("v", &mut &Tar::new().done()[..], (0, 0))
            .unwrap();
        engine.ls("v", b"/").unwrap().len()
    });
    assert_eq!(all.unwrap().join().unwrap(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_hostile_tar_file_is_imported_or_refused(bytes in hostile::bytes(Just(Tar::new()
        .pax(&[("path", b"d/long"), ("mtime", b"1.5"), ("SCHILY.xattr.user.k", b"v")])
        .file("a", b"content")
        .other(EntryType::Directory, "d", "")
        .other(EntryType::Symlink, "d/s", "../a")
        .other(EntryType::Link, "d/h", "a")
        .file("b", &[5; 600])
        .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9000")])
        .file("s", &[b"1\n4096\n512\n", &[0; 501][..], &[5; 512]].concat())
        .done()))) {
        thread_local! {
            static BENCH: Bench = Bench::new();
        }
        BENCH.with(|bench| {
            if let Err(error) = import(bench, &bytes) {
                assert!(!error.message.is_empty());
            }
            assert_eq!(bench.engine().live_forks(), 0);
            check(bench);
        });
    }
}

#[test]
fn what_an_import_had_unpacked_goes_when_its_daemon_has_ended() {
    let mut bench = Bench::new();
    let id = bench.fork("w");
    put(&bench.fs(id), "f", &noise(100_000, 1));
    bench.commit(id, false);
    let mut tar = Vec::new();
    bench.engine().export("w", &mut tar).unwrap();
    bench.engine().store.steps.cut(Step::Unpacked, 1);
    let cut_off = bench.engine().import("v", &mut tar.as_slice(), (0, 0));
    assert!(cut_off.is_err());
    kill(&mut bench);
    assert!(bench.engine().forks().unwrap().is_empty());
    no_strays(&bench);
    check(&bench);
    import(&bench, &tar).unwrap();
}
