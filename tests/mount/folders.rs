//! Folders of one fork, each mounted by itself.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::common::{TestStore, sh};

/// A volume with a file of two names, one in each of two folders, and one with both names in the same.
fn bench() -> TestStore {
    let bench = TestStore::new();
    let mount = bench.fork("v");
    let at = |name: &str| mount.path.join(name);
    fs::create_dir_all(at("a/deep")).unwrap();
    fs::create_dir(at("b")).unwrap();
    fs::write(at("a/shared"), "one\n").unwrap();
    fs::hard_link(at("a/shared"), at("b/shared")).unwrap();
    fs::write(at("a/twin"), "twin\n").unwrap();
    fs::hard_link(at("a/twin"), at("a/deep/twin")).unwrap();
    fs::write(at("a/mine"), "a").unwrap();
    assert_eq!(bench.commit(mount), Some(1));
    bench
}

#[test]
fn a_session_shows_its_folder_and_nothing_above() {
    let bench = bench();
    let whole = bench.fork("v");
    let ino = fs::metadata(whole.path.join("a")).unwrap().ino();
    drop(whole);
    let id = bench.fork_only("v");
    let a = bench.mount_folder(id, "a");
    assert_eq!(fs::metadata(&a.path).unwrap().ino(), ino);
    let mut names: Vec<_> = fs::read_dir(&a.path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["deep", "mine", "shared", "twin"]);
    fs::write(a.path.join("deep/new"), "new").unwrap();
    fs::rename(a.path.join("deep/new"), a.path.join("new")).unwrap();
    assert_eq!(fs::read(a.path.join("new")).unwrap(), b"new");
}

#[test]
fn a_folder_that_is_missing_is_made_and_all_folders_are_committed_as_one() {
    let bench = bench();
    let id = bench.fork_only("v");
    let (a, c) = (bench.mount_folder(id, "a"), bench.mount_folder(id, "c/d"));
    fs::write(a.path.join("x"), "x").unwrap();
    fs::write(c.path.join("y"), "y").unwrap();
    assert_eq!(bench.commit_as(&a, false), Some(2));
    drop((a, c));
    let mount = bench.fork("v");
    assert_eq!(fs::read(mount.path.join("a/x")).unwrap(), b"x");
    assert_eq!(fs::read(mount.path.join("c/d/y")).unwrap(), b"y");
}

/// > A file with names in two of them is cached by neither and cannot be mapped shared.
#[test]
fn a_file_with_names_in_two_folders_is_one_file_for_both() {
    let bench = bench();
    let id = bench.fork_only("v");
    let (a, b) = (bench.mount_folder(id, "a"), bench.mount_folder(id, "b"));
    let (in_a, in_b) = (a.path.join("shared"), b.path.join("shared"));
    assert_eq!(fs::read(&in_b).unwrap(), b"one\n");
    let mut reader = fs::File::open(&in_b).unwrap();
    let mut first = OpenOptions::new().append(true).open(&in_a).unwrap();
    let mut second = OpenOptions::new().append(true).open(&in_b).unwrap();
    for turn in 0..20 {
        writeln!(first, "a{turn}").unwrap();
        writeln!(second, "b{turn}").unwrap();
        assert_eq!(
            fs::metadata(&in_a).unwrap().len(),
            fs::metadata(&in_b).unwrap().len()
        );
    }
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let expected: String = (0..20).map(|turn| format!("a{turn}\nb{turn}\n")).collect();
    assert_eq!(text, format!("one\n{expected}"));
    assert_eq!(fs::read_to_string(&in_a).unwrap(), text);

    fs::remove_file(&in_a).unwrap();
    assert_eq!(fs::metadata(&in_b).unwrap().nlink(), 1);
    second.seek(SeekFrom::Start(0)).unwrap();
    second.set_len(2).unwrap();
    assert_eq!(fs::read(&in_b).unwrap(), b"on");
}

/// > A file with names in two of them is cached by neither and cannot be mapped shared.
#[test]
fn a_file_that_is_open_in_one_folder_and_has_its_names_in_the_other_is_one_file_for_both() {
    let bench = TestStore::new();
    for (round, inside) in [1, 2, 1].into_iter().enumerate() {
        let volume = format!("w{round}");
        let whole = bench.fork(&volume);
        fs::create_dir(whole.path.join("a")).unwrap();
        fs::create_dir(whole.path.join("b")).unwrap();
        fs::write(whole.path.join("a/s"), "one\n").unwrap();
        for n in 0..inside {
            fs::hard_link(whole.path.join("a/s"), whole.path.join(format!("b/s{n}"))).unwrap();
        }
        fs::write(whole.path.join("a/other"), "other").unwrap();
        bench.commit(whole);
        let id = bench.fork_only(&volume);
        let (a, b) = (bench.mount_folder(id, "a"), bench.mount_folder(id, "b"));
        let (in_a, in_b) = (a.path.join("s"), b.path.join("s0"));
        let append = || OpenOptions::new().read(true).append(true).clone();
        let mut first = append().open(&in_a).unwrap();
        match round {
            2 => fs::rename(a.path.join("other"), &in_a).unwrap(),
            _ => fs::remove_file(&in_a).unwrap(),
        }
        assert_eq!(first.metadata().unwrap().nlink(), inside as u64);
        let mut second = append().open(&in_b).unwrap();
        assert_eq!(fs::read(&in_b).unwrap(), b"one\n");
        first.write_all(b"written by A\n").unwrap();
        second.write_all(b"B\n").unwrap();
        let expected = "one\nwritten by A\nB\n";
        assert_eq!(fs::read_to_string(&in_b).unwrap(), expected);
        let mut text = String::new();
        first.seek(SeekFrom::Start(0)).unwrap();
        first.read_to_string(&mut text).unwrap();
        assert_eq!(text, expected);
        for (file, other, mode) in [(&first, &second, 0o600), (&second, &first, 0o640)] {
            file.set_permissions(fs::Permissions::from_mode(mode))
                .unwrap();
            assert_eq!(other.metadata().unwrap().mode() & 0o777, mode);
            assert_eq!(other.metadata().unwrap().len(), expected.len() as u64);
        }
    }
}

/// > A file with names in two of them is cached by neither and cannot be mapped shared.
#[test]
fn a_file_all_of_whose_names_are_inside_is_cached_as_ever() {
    let bench = bench();
    let id = bench.fork_only("v");
    let a = bench.mount_folder(id, "a");
    let _b = bench.mount_folder(id, "b");
    let maps = |name: &str| {
        let script = format!(
            "python3 -c 'import mmap; file = open(\"{name}\", \"r+b\"); mmap.mmap(file.fileno(), 1)' 2>/dev/null && echo yes || echo no"
        );
        sh(&a.path, &script).trim() == "yes"
    };
    assert!(maps("twin") && maps("mine"));
    assert!(!maps("shared"), "another kernel changes it too");
    let at = |name: &str| a.path.join(name);
    fs::write(at("new"), "x").unwrap();
    fs::hard_link(at("new"), at("again")).unwrap();
    fs::rename(at("twin"), at("moved")).unwrap();
    assert!(maps("new") && maps("again") && maps("moved"));
    fs::remove_file(at("new")).unwrap();
    assert!(maps("again"));
    // Not even by a link from inside, though its other name is gone.
    fs::hard_link(at("shared"), at("more")).unwrap();
    assert!(!maps("more") && !maps("shared"));
}

/// > Folders of one fork that are mounted by themselves are filesystems of their own: `rename` and `link` from one to another give
/// > EXDEV.
#[test]
fn names_across_folders_are_refused_as_between_filesystems() {
    let bench = bench();
    let id = bench.fork_only("v");
    let (a, b) = (bench.mount_folder(id, "a"), bench.mount_folder(id, "b"));
    let exdev = Some(18);
    let (from, to) = (a.path.join("mine"), b.path.join("mine"));
    assert_eq!(fs::hard_link(&from, &to).unwrap_err().raw_os_error(), exdev);
    assert_eq!(fs::rename(&from, &to).unwrap_err().raw_os_error(), exdev);
}

#[test]
fn folders_that_overlap_are_not_served_twice() {
    let bench = bench();
    let id = bench.fork_only("v");
    let a = bench.mount_folder(id, "a");
    for folder in ["", "a", "a/deep"] {
        let error = bench.try_mount_folder(id, folder).err().unwrap();
        assert!(error.contains("mounted already"), "{error}");
    }
    let error = bench.try_mount_folder(id, "b/shared").err().unwrap();
    assert!(error.contains("not a folder"), "{error}");
    drop(a);
    bench.wait_unmounted(id);
    bench.mount_folder(id, "a/deep");
}

#[test]
fn an_open_file_without_names_lives_as_long_as_the_session_that_knows_it() {
    let bench = bench();
    let id = bench.fork_only("v");
    let a = bench.mount_folder(id, "a");
    let b = bench.mount_folder(id, "b");
    let mut file = fs::File::open(b.path.join("shared")).unwrap();
    fs::remove_file(a.path.join("shared")).unwrap();
    fs::remove_file(b.path.join("shared")).unwrap();
    drop(a);
    std::thread::sleep(std::time::Duration::from_millis(200));
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "one\n");
}
