use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use crate::common::{TestStore, sh};

/// > It has their owners, modes, nanosecond times and creation times. Inode numbers, change times and modification times survive a
/// > commit bit for bit, so git, make, cargo and rsync stay warm.
#[test]
fn a_committed_tree_is_the_same_bit_for_bit_in_the_next_fork() {
    let store = TestStore::new();
    let first = store.fork("v");
    let listing = r#"find . -printf '%P %y %m %U %G %s %n %T@ %C@ %i %l\n' | sort"#;
    sh(
        &first.path,
        r#"
        mkdir -p a/b 'with space'; echo hi > a/b/f; ln a/b/f a/hard; ln -s ../x a/sym; mkfifo pipe
        mknod dev c 1 3; head -c 3000000 /dev/urandom > big; truncate -s 10M sparse; echo x >> sparse
        setfattr -n user.k -v v a/b/f; setfattr -n trusted.t -v w a; chmod 4755 a/b/f; chown 12:34 big
        touch -d '2001-02-03 04:05:06.123456789' a/b
        "#,
    );
    let sums = "find . -type f -print0 | sort -z | xargs -0 sha256sum; getfattr -hd -m - -R . ";
    let before = (sh(&first.path, listing), sh(&first.path, sums));
    assert_eq!(store.commit(first), Some(1));
    let second = store.fork("v");
    assert_eq!((sh(&second.path, listing), sh(&second.path, sums)), before);
    drop(second);
    store.check();
}

#[test]
fn twenty_thousand_files_can_be_removed_while_they_are_listed() {
    let store = TestStore::new();
    let mount = store.fork("v");
    sh(&mount.path, "mkdir d; cd d; seq 20000 | xargs touch");
    sh(&mount.path, "find d -type f -delete; rmdir d");
    assert_eq!(fs::read_dir(&mount.path).unwrap().count(), 0);
}

/// > Files that were unlinked while open stay usable until they are closed, and are never committed.
#[test]
fn an_unlinked_file_stays_readable_and_growable_while_it_is_open() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let path = mount.path.join("f");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.write_all(b"before").unwrap();
    fs::remove_file(&path).unwrap();
    file.write_all(b" after").unwrap();
    store.commit_as(&mount, true);
    file.write_all(b" commit").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before after commit");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
}

#[test]
fn a_suid_program_loses_its_rights_when_another_user_writes_it() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let id = sh(
        &mount.path,
        r#"
        chmod 755 .; cp /usr/bin/id id; chmod 4777 id; ls -l id >/dev/null
        setpriv --reuid 65534 --regid 65534 --clear-groups bash -c 'printf x >> id; ./id -u'
        "#,
    );
    assert_eq!(id.trim(), "65534");
    assert_eq!(
        fs::metadata(mount.path.join("id")).unwrap().mode() & 0o7777,
        0o777
    );
}

#[test]
fn truncating_down_and_up_again_shows_zeros() {
    let store = TestStore::new();
    let base = store.fork("v");
    fs::write(base.path.join("f"), vec![7; 300_000]).unwrap();
    store.commit(base);
    let mount = store.fork("v");
    let file = File::options()
        .read(true)
        .write(true)
        .open(mount.path.join("f"))
        .unwrap();
    file.set_len(100_001).unwrap();
    file.set_len(300_000).unwrap();
    let mut bytes = vec![1; 300_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..100_001].iter().all(|b| *b == 7) && bytes[100_001..].iter().all(|b| *b == 0));
}

/// > `copy_file_range` shares content instead of copying it.
#[test]
fn a_copy_shares_content_until_either_side_is_written() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let bytes: Vec<u8> = (0..4_000_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(mount.path.join("a"), &bytes).unwrap();
    let before = store.engine.forks().unwrap()[0].bytes;
    fs::copy(mount.path.join("a"), mount.path.join("b")).unwrap();
    let after = store.engine.forks().unwrap()[0].bytes;
    assert!(
        after - before < 1 << 20,
        "{} bytes for a copy",
        after - before
    );
    let a = File::options()
        .write(true)
        .open(mount.path.join("a"))
        .unwrap();
    a.write_all_at(b"changed", 5000).unwrap();
    assert!(fs::read(mount.path.join("b")).unwrap() == bytes);
    let mut changed = bytes.clone();
    changed[5000..5007].copy_from_slice(b"changed");
    assert!(fs::read(mount.path.join("a")).unwrap() == changed);
    store.commit(mount);
    let next = store.fork("v");
    assert!(
        fs::read(next.path.join("a")).unwrap() == changed
            && fs::read(next.path.join("b")).unwrap() == bytes
    );
    drop(next);
    store.check();
}

/// > A commit is of one point in time.
#[test]
fn a_commit_with_keep_while_a_writer_runs_is_one_point_in_time() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let path = mount.path.clone();
    // Each round writes one number all over two files, the first file first.
    let writer = std::thread::spawn(move || {
        let open = |name: &str| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path.join(name))
                .unwrap()
        };
        let (a, b) = (open("a"), open("b"));
        for round in 1..=400_u32 {
            a.write_all_at(&round.to_le_bytes().repeat(10_000), 0)
                .unwrap();
            b.write_all_at(&round.to_le_bytes().repeat(10_000), 0)
                .unwrap();
        }
    });
    let mut versions = Vec::new();
    while !writer.is_finished() {
        versions.extend(store.commit_as(&mount, true));
    }
    writer.join().unwrap();
    versions.extend(store.commit_as(&mount, true));
    let read = |version: u64, name: &str| -> Vec<u32> {
        let mut out = Vec::new();
        match store
            .engine
            .cat(&format!("v@{version}"), name.as_bytes(), &mut out)
        {
            Ok(()) => out
                .chunks_exact(4)
                .map(|n| u32::from_le_bytes(n.try_into().unwrap()))
                .collect(),
            Err(_) => Vec::new(),
        }
    };
    let mut last = 0;
    for version in versions {
        let (a, b) = (read(version, "a"), read(version, "b"));
        let round = a.iter().copied().max().unwrap_or(0);
        assert!(
            round >= last,
            "version {version} is older than the one before"
        );
        // One write is one request here, so each file holds one round, and b is at most one behind.
        assert!(
            a.iter().chain(&b).all(|n| *n == round || *n + 1 == round),
            "version {version}"
        );
        assert!(b.windows(2).all(|w| w[0] == w[1]), "version {version}");
        last = round;
    }
    assert_eq!(last, 400);
    store.check();
}

/// > `forkvol commit` ends the mount: what is still open there gets ENOTCONN. Where a mount could not be ended, what holds it reads
/// > the committed state; every write fails.
#[test]
fn later_writes_through_what_is_left_of_a_committed_mount_fail_and_the_head_stays() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let path = mount.path.join("f");
    fs::write(&path, "committed").unwrap();
    let mut file = File::options().append(true).open(&path).unwrap();
    assert_eq!(store.commit_as(&mount, false), Some(1));
    assert!(file.write_all(b"late").is_err());
    assert_eq!(fs::read_to_string(&path).unwrap(), "committed");
    // What the command does, if it can.
    drop(mount);
    let error = file.write_all(b"late").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotConnected);
    assert_eq!(
        fs::read_to_string(store.fork("v").path.join("f")).unwrap(),
        "committed"
    );
}

/// > An unmount is not a commit. A fork unmounted behind forkvol's back stays `unmounted` and can be mounted again by `forkvol
/// > mount`.
#[test]
fn a_fork_unmounted_behind_our_back_can_be_mounted_again_with_everything() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let id = mount.id;
    fs::write(mount.path.join("f"), "text").unwrap();
    drop(mount);
    while store.engine.forks().unwrap()[0].state != "unmounted" {
        std::thread::yield_now();
    }
    assert_eq!(
        store.engine.volume("v").unwrap().head,
        None,
        "that is no commit"
    );
    let again = store.mount(id);
    assert_eq!(fs::read_to_string(again.path.join("f")).unwrap(), "text");
    assert_eq!(store.commit(again), Some(1));
}

#[test]
fn a_container_with_another_mount_namespace_and_uid_works_in_a_fork() {
    let store = TestStore::new();
    let mount = store.fork("v");
    sh(&mount.path, "chmod 777 .");
    let path = mount.path.display();
    let out = sh(
        &mount.path,
        &format!(
            "bwrap --ro-bind / / --dev /dev --tmpfs /tmp --bind {path} /mnt --unshare-all --uid 1000 --gid 1000 \
             sh -c 'echo inside > /mnt/f; cat /mnt/f'"
        ),
    );
    assert_eq!(out, "inside\n");
    assert_eq!(
        fs::read_to_string(mount.path.join("f")).unwrap(),
        "inside\n"
    );
}

/// > `df` shows what is left of it, or of the disk where that is less.
#[test]
fn df_shows_the_room_that_is_left_and_never_more_than_the_disk_has() {
    let store = TestStore::new();
    let mount = store.fork_with("v", |request| request.size = 100 << 20);
    let free = || -> u64 {
        sh(&mount.path, "stat -f -c %a .")
            .trim()
            .parse::<u64>()
            .unwrap()
            * 4096
    };
    let before = free();
    assert!(before <= 100 << 20 && before > 99 << 20);
    fs::write(mount.path.join("f"), vec![1; 50 << 20]).unwrap();
    assert!(free() < before - (49 << 20));
    assert_eq!(
        fs::write(mount.path.join("g"), vec![1; 60 << 20])
            .unwrap_err()
            .raw_os_error(),
        Some(28)
    );
    fs::remove_file(mount.path.join("g")).unwrap();
    assert_eq!(fs::read(mount.path.join("f")).unwrap().len(), 50 << 20);
    assert_eq!(store.commit(mount), Some(1));
}

/// > It has extended attributes (`user`, `trusted`, `security`), and POSIX ACLs with inheritance where the fork was made with
/// > `--acl` or its base has some. Without ACLs, setting one gives EOPNOTSUPP.
#[test]
fn acls_are_inherited_where_the_fork_has_them_and_refused_where_not() {
    let store = TestStore::new();
    let plain = store.fork("v");
    assert!(sh(&plain.path, "touch f; ! setfacl -m u:4242:rw f 2>&1").contains("not supported"));
    let mount = store.fork_with("w", |request| request.acl = true);
    let out = sh(
        &mount.path,
        "mkdir d; setfacl -d -m u:4242:rwx d; touch d/f; mkdir d/e; getfacl -cE d/f; getfacl -cdE d/e",
    );
    assert!(
        out.contains("user:4242:rwx\ngroup::r-x\nmask::rw-")
            && out.contains("user:4242:rwx\ngroup::r-x\nmask::rwx"),
        "{out}"
    );
    store.commit(mount);
    let next = store.fork("w");
    let out = sh(
        &next.path,
        "touch d/g; getfacl -cE d/g; setfacl -m u:4343:r d/f",
    );
    assert!(
        out.contains("user:4242:rwx\ngroup::r-x\nmask::rw-"),
        "its base has some: {out}"
    );
}

/// > Times are kept from 1677 to 2262; one outside of that becomes the nearest within.
#[test]
fn times_are_kept_to_the_nanosecond_on_both_sides_of_1970() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let path = mount.path.join("f");
    let file = File::create(&path).unwrap();
    let set = |seconds, nanos| {
        let time = rustix::fs::Timespec {
            tv_sec: seconds,
            tv_nsec: nanos,
        };
        let times = rustix::fs::Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::futimens(&file, &times).unwrap();
        let found = fs::metadata(&path).unwrap();
        let modified = (found.mtime(), found.mtime_nsec());
        assert_eq!((found.atime(), found.atime_nsec()), modified);
        modified
    };
    for (seconds, nanos) in [
        (0, 0),
        (0, 1),
        (-1, 999_999_999),
        (-2, 500_000_000),
        (-5, 0),
        (-189_291_357, 123_456_803),
        (1_700_000_000, 987_654_321),
        (5_000_000_000, 1),
        (-5_000_000_000, 1),
    ] {
        assert_eq!(set(seconds, nanos), (seconds, nanos));
    }
    for seconds in [9_300_000_000, 1 << 60] {
        assert_eq!(set(seconds, 3), (9_223_372_036, 854_775_807));
        assert_eq!(set(-seconds, 3), (-9_223_372_037, 145_224_192));
    }
}

#[test]
fn a_chown_that_names_nobody_takes_suid_and_sgid_from_a_file_and_nothing_from_a_folder() {
    let store = TestStore::new();
    let mount = store.fork("v");
    fs::write(mount.path.join("f"), "x").unwrap();
    fs::create_dir(mount.path.join("d")).unwrap();
    for (name, before, after) in [
        ("f", 0o6755, 0o755),
        ("f", 0o6745, 0o2745),
        ("d", 0o6755, 0o6755),
    ] {
        let path = mount.path.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(before)).unwrap();
        std::os::unix::fs::chown(&path, None, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, after);
    }
}

#[test]
fn a_page_that_is_written_back_without_room_is_an_error_of_msync() {
    let store = TestStore::new();
    let mount = store.fork_with("v", |request| request.size = 1 << 20);
    let out = sh(
        &mount.path,
        r#"head -c 100 /dev/urandom > f; truncate -s 20000 f; dd if=/dev/zero of=full bs=4096 status=none 2>/dev/null || true
        python3 - <<'E'
import mmap
with open('f', 'r+b') as f:
    m = mmap.mmap(f.fileno(), 20000)
    m[0:20000] = b'x' * 20000
    try: m.flush(); print('all written')
    except OSError as e: print(e.strerror)
E"#,
    );
    assert_eq!(out.trim(), "No space left on device");
}

/// > `SEEK_DATA` and `SEEK_HOLE` find what was stored through a mapping as data behind its `msync`, and not surely before.
#[test]
fn what_was_stored_through_a_mapping_is_found_as_data_behind_msync() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let out = sh(
        &mount.path,
        r#"truncate -s 40960 f; python3 - <<'E'
import mmap, os
f = os.open('f', os.O_RDWR)
m = mmap.mmap(f, 40960)
m[8192] = 1
m.flush()
data = os.lseek(f, 0, os.SEEK_DATA)
print(data, os.lseek(f, data, os.SEEK_HOLE))
E"#,
    );
    assert_eq!(out.trim(), "8192 12288");
}

/// > Holes stay holes, on 4 KiB boundaries, and zeros that were written stay data.
#[test]
fn holes_are_found_and_zeros_stay_data() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let runs = "python3 - <<'E'\nimport os\nf=os.open('f',os.O_RDONLY);n=os.fstat(f).st_size;at=0;r=[]\n\
                while at<n:\n  try: d=os.lseek(f,at,os.SEEK_DATA)\n  except OSError: break\n  at=os.lseek(f,d,os.SEEK_HOLE);r.append((d,at))\n\
                print(r, os.fstat(f).st_blocks)\nE";
    sh(
        &mount.path,
        "truncate -s 1M f; printf x | dd of=f bs=1 seek=500000 conv=notrunc status=none; \
         dd if=/dev/zero of=f bs=4096 seek=10 count=2 conv=notrunc status=none; fallocate -p -o 499712 -l 100 f",
    );
    let before = sh(&mount.path, runs);
    assert_eq!(before.trim(), "[(40960, 49152), (499712, 503808)] 24");
    store.commit(mount);
    let next = store.fork("v");
    assert_eq!(sh(&next.path, runs), before, "the same after a commit");
}

/// > Where a mount could not be ended, what holds it reads the committed state; every write fails.
#[test]
fn the_room_of_a_committed_fork_comes_back_though_its_mount_lingers_and_it_still_reads_right() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let bytes: Vec<u8> = (0..9_000_000_u32).map(|n| (n / 7) as u8).collect();
    fs::write(mount.path.join("f"), &bytes).unwrap();
    let spool = store
        .dir()
        .join("forks")
        .join(mount.id.to_string())
        .join("spool");
    assert!(fs::metadata(&spool).unwrap().len() >= 9_000_000);
    assert_eq!(store.commit_as(&mount, false), Some(1));
    while fs::metadata(&spool).unwrap().len() > 0 {
        std::thread::yield_now();
    }
    // Past what the kernel has kept of it.
    sh(
        &mount.path,
        "dd if=f of=/dev/null iflag=nocache count=0 status=none",
    );
    assert_eq!(fs::read(mount.path.join("f")).unwrap(), bytes);
    assert_eq!(
        fs::write(mount.path.join("f"), "late").unwrap_err().kind(),
        std::io::ErrorKind::ReadOnlyFilesystem
    );
}

/// > `O_TMPFILE` and `FS_IOC_*` are not there. `statx` shows no creation time.
#[test]
fn what_the_manual_says_is_not_there_is_refused_and_not_pretended() {
    use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, ioctl_getflags, open, statx};
    use rustix::io::Errno;
    let store = TestStore::new();
    let mount = store.fork("v");
    let unnamed = open(&mount.path, OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR);
    assert_eq!(unnamed.unwrap_err(), Errno::OPNOTSUPP);
    let path = mount.path.join("f");
    let file = File::create(&path).unwrap();
    assert_eq!(ioctl_getflags(&file).unwrap_err(), Errno::NOTTY);
    let asked = StatxFlags::BTIME | StatxFlags::BASIC_STATS;
    let found = statx(&file, "", AtFlags::EMPTY_PATH, asked).unwrap();
    assert!(found.stx_mask & StatxFlags::BASIC_STATS.bits() != 0);
    assert_eq!(found.stx_mask & StatxFlags::BTIME.bits(), 0);
}

/// > Writing a file does not clear a setgid bit that stands without execution for the group: FUSE does not say who is a member of
/// > the group.
#[test]
fn a_setgid_bit_without_execution_for_the_group_outlives_a_write() {
    let store = TestStore::new();
    let mount = store.fork("v");
    fs::set_permissions(&mount.path, fs::Permissions::from_mode(0o777)).unwrap();
    let mode = |name: &str| fs::metadata(mount.path.join(name)).unwrap().mode() & 0o7777;
    for (name, before, after) in [("stays", 0o2666, 0o2666), ("goes", 0o2676, 0o676)] {
        fs::write(mount.path.join(name), "x").unwrap();
        fs::set_permissions(mount.path.join(name), fs::Permissions::from_mode(before)).unwrap();
        sh(
            &mount.path,
            &format!("setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'echo y >> {name}'"),
        );
        assert_eq!(mode(name), after, "{name}");
    }
}
