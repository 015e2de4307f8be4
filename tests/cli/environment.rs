//! Bad input and bad surroundings: each has one line that names what is wrong and what helps, its own exit status, and costs nothing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::*;

/// `user` runs a command as an ordinary user with a home and a store; `says` runs one
/// that must fail, and prints its status and its one line.
const PROLOGUE: &str = r#"
    cd "$WORK"
    user() {
      (cd "$WORK/home" && exec env -u XDG_CONFIG_HOME HOME="$WORK/home" XDG_RUNTIME_DIR="$WORK/run" TMPDIR="$WORK/run" \
        FORKVOL_STORE="${STORE:-$WORK/home/store}" setpriv --reuid 65534 --regid 65534 --clear-groups "$@")
    }
    says() {
      local status=0
      "$@" > "$WORK/out" 2> "$WORK/err" || status=$?
      grep -v 'warning: the \(store\|daemon of\) ' "$WORK/err" | grep -v '^{' > "$WORK/line" || status="$status without a word"
      [ "$(wc -l < "$WORK/line")" = 1 ] || status="$status in several lines"
      echo "$status $(sed "s#$WORK/##g; s/^forkvol: //" "$WORK/line")"
    }
    stop() {
      forkvol abandon --all > "$WORK/out" 2>&1 || echo "not abandoned" >&2
      forkvol daemon stop --force > "$WORK/out" 2>&1 || echo "no daemon" >&2
      user forkvol daemon stop --force > "$WORK/out" 2>&1 || echo "no daemon of the user" >&2
    }
    trap stop EXIT
"#;

/// Runs a script; returns the lines it prints.
pub fn surrounded(script: &str) -> Vec<String> {
    let work = Work::new();
    fs::create_dir_all(work.at("config/forkvol")).unwrap();
    for folder in ["home", "run"] {
        work.home(folder, 65_534);
    }
    let mut command = work.script(&format!("{PROLOGUE}\n{script}"));
    command
        .env("FORKVOL_STORE", work.at("store"))
        .env("XDG_CONFIG_HOME", work.at("config"))
        .env("TMPDIR", work.dir.path());
    printed(&mut command).lines().map(str::to_owned).collect()
}

/// Each line begins with its status and has all its words.
pub fn expect(lines: &[String], expected: &[(&str, &[&str])]) {
    assert_eq!(lines.len(), expected.len(), "{lines:#?}");
    for (line, (status, words)) in lines.iter().zip(expected) {
        let (found, said) = line.split_once(' ').unwrap_or((line, ""));
        assert_eq!(found, *status, "{line}\n{lines:#?}");
        for word in *words {
            assert!(said.contains(word), "{line:?} lacks {word:?}");
        }
    }
}

#[test]
#[cfg_attr(not(libc_linked_in), ignore = "the C library has no archive here")]
fn the_program_needs_no_file_of_the_system_that_it_is_put_into() {
    let cli = Cli::new();
    let root = cli.path("root");
    fs::create_dir(&root).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_forkvol"), root.join("forkvol")).unwrap();
    let mut inside = Command::new("unshare");
    inside.arg("--map-root-user").arg("--root").arg(&root);
    let output = inside.args(["/forkvol", "config"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn what_is_not_there_is_named_with_what_lists_it() {
    let cli = Cli::new();
    cli.run("v", &cli.path("cache"), "echo 1 > cache/f");
    for (line, says) in [
        ("log x", "no volume x; `forkvol volumes`"),
        ("volume show x", "no volume x; `forkvol volumes`"),
        ("volume rm x", "no volume x; `forkvol volumes`"),
        ("volume rename x y", "no volume x; `forkvol volumes`"),
        ("volume reset x", "no volume x; `forkvol volumes`"),
        ("fork v m --from x@3", "no volume x; `forkvol volumes`"),
        ("ls v@7", "no version v@7; `forkvol log v`"),
        (
            "cat v@xabcdef12:f",
            "no version v@xabcdef12; `forkvol log v`",
        ),
        ("diff v v@9", "no version v@9; `forkvol log v`"),
        ("export v@9", "no version v@9; `forkvol log v`"),
        ("rollback v 9", "no version v@9; `forkvol log v`"),
        ("pin v@9", "no version v@9; `forkvol log v`"),
        ("unpin v@9", "no version v@9; `forkvol log v`"),
        ("cat v:nothing", "v has no nothing"),
        (
            "commit f-000000000001",
            "no fork f-000000000001; `forkvol forks`",
        ),
        ("commit nonsense", "no fork nonsense; `forkvol forks`"),
        ("commit ./m", "no fork is mounted at ./m; see forkvol forks"),
        (
            "abandon f-000000000001",
            "no fork f-000000000001; `forkvol forks`",
        ),
        (
            "mount f-000000000001",
            "no fork f-000000000001; `forkvol forks`",
        ),
    ] {
        let (code, text) = cli.fails(&line.split(' ').collect::<Vec<_>>());
        assert!(code == 10 && text.contains(says), "{line}: {code} {text}");
    }
    let (code, text) = cli.fails(&["cat", "v:"]);
    assert!(
        code == 1 && text.contains(": / in v is no regular file"),
        "{text}"
    );
    assert_eq!(cli.ok(&["forks"]), "", "nothing was left over");
    assert!(!cli.path("m").exists());
}

#[test]
fn a_file_that_cannot_be_read_or_written_is_named_in_words() {
    let cli = Cli::new();
    cli.run("v", &cli.path("cache"), "echo 1 > cache/f");
    fs::write(cli.path("junk"), "no tar").unwrap();
    fs::write(cli.path("long"), "no tar\n".repeat(1000)).unwrap();
    fs::write(cli.path("package-lock.json"), "{}").unwrap();
    let none = "there is no such file or folder";
    for (line, says) in [
        (
            "export v -o nodir/x",
            "cannot write nodir/x: there is no folder nodir; make it",
        ),
        (
            "export v -o cache",
            "cannot write cache: it is a folder; name a file in it",
        ),
        ("import w nofile", &format!("cannot read nofile: {none}")),
        ("import w cache", "cannot read cache: it is a folder"),
        ("import w junk", "cannot import junk: it is no tar file"),
        ("import w long", "cannot import long: it is no tar file"),
        ("detect nodir", &format!("cannot look into nodir: {none}")),
        ("detect package-lock.json", "it is a file; name the folder"),
    ] {
        let (code, text) = cli.fails(&line.split(' ').collect::<Vec<_>>());
        assert!(code == 1 && text.contains(says), "{line}: {code} {text}");
        assert!(!text.contains("os error"), "{text}");
    }
    let left = fs::read_dir(cli.dir.path()).unwrap();
    let left = left.filter(|e| e.as_ref().unwrap().file_name().as_encoded_bytes()[0] == b'.');
    assert_eq!(left.count(), 0);
}

#[test]
fn what_is_no_value_is_a_mistake_of_the_caller() {
    let cli = Cli::new();
    for (line, says) in [
        ("log ../x", "is not a volume's name"),
        ("log v@7", "only letters, digits"),
        ("fork a//b m", "\"a//b\" is not a volume's name"),
        ("volume rename v a/", "is not a volume's name"),
        ("fork v m --size 3q", "\"3q\" is not a size"),
        ("fork v m --label =x", "\"=x\" is not a label"),
        ("fork v m --owner bob", "\"bob\" is not an owner"),
        (
            "fork v m --label-file nothing",
            "--label-file nothing: there is no such file",
        ),
        (
            "fork v m --lock-file nothing",
            "--lock-file nothing: there is no such file",
        ),
        ("commit f-1 --busy wait=3x", "\"3x\" is not a duration"),
        ("daemon stop --drain=3q", "\"3q\" is not a duration"),
        ("attach --job 1 -p c", "-p c has no -v before it"),
        ("pin v@x", "\"v@x\" is no version"),
        ("cat v", "write VERSION:PATH"),
        (
            "fork v",
            "required arguments were not provided: <MOUNTPOINT>",
        ),
        ("frok v m", "unrecognized subcommand 'frok'"),
    ] {
        let (code, text) = cli.fails(&line.split(' ').collect::<Vec<_>>());
        assert!(code == 2 && text.contains(says), "{line}: {code} {text}");
        assert!(!text.contains("For more") && !text.contains("::"), "{text}");
    }
    // What the store itself refuses says which one it is.
    cli.run("v", &cli.path("cache"), "echo 1 > cache/f");
    cli.run("w", &cli.path("cache"), "echo 1 > cache/f");
    let store = cli.path("store");
    for line in [
        "volume rename v w",
        "ls v@x12",
        "fork v m --exclude {{{",
        "rollback v w@1",
    ] {
        let (code, text) = cli.fails(&line.split(' ').collect::<Vec<_>>());
        assert_eq!(code, 2, "{line}: {text}");
        assert_eq!(text.matches(store.to_str().unwrap()).count(), 1, "{text}");
    }
    let (_, text) = cli.fails(&["attach", "--job", "1", "-p", "c"]);
    assert!(!text.contains(store.to_str().unwrap()), "{text}");
    fs::write(cli.path("twice"), "k=v\n k = w\n").unwrap();
    let (code, text) = cli.fails(&["fork", "v", "m", "--label-file", "twice"]);
    assert!(
        code == 2 && text.contains("twice: the label k is there twice"),
        "{text}"
    );
    let long = format!("k={}", "x".repeat(5000));
    let (code, text) = cli.fails(&["fork", "v", "m", "--label", &long]);
    assert!(
        code == 2 && text.contains("5000 bytes, and 4096 is") && text.len() < 1100,
        "{text}"
    );
    for line in ["log run run", "abandon run --bogus", "--store run log"] {
        let (code, text) = cli.fails(&line.split(' ').collect::<Vec<_>>());
        assert_eq!(code, 2, "{line}: {text}");
    }
    for line in [
        "--store x run -v ../x -- true",
        "run -v ../x -- true",
        "run -v v --size 3q -- true",
        "run -v v -p c",
    ] {
        let (code, text) = cli.fails(&line.split(' ').collect::<Vec<_>>());
        assert_eq!(code, 125, "{line}: {text}");
    }
    let (code, text) = cli.fails(&["fork", "v", "no/parent"]);
    assert!(
        code == 1 && text.contains("only the last component is created"),
        "{text}"
    );
    for path in ["/", "/proc/x", "/usr"] {
        assert_eq!(cli.fails(&["fork", "v", path]).0, 14, "{path}");
    }
}

/// > A fork unmounted behind forkvol's back stays `unmounted` and can be mounted again by `forkvol mount`.
#[test]
fn a_mount_that_was_taken_away_by_somebody_else_costs_nothing() {
    let lines = surrounded(
        r#"id=$(forkvol fork v m)
        echo kept > m/f
        umount m
        says forkvol commit ./m
        forkvol mount "$id" > out
        cat m/f
        umount -l m
        forkvol commit "$id"
        forkvol cat v:f
        forkvol run -v v -p c -- bash -c 'echo more > c/g; umount -l c' 2> err
        cat err
        forkvol cat v:g
        forkvol forks"#,
    );
    assert_eq!(
        lines[0],
        "10 no fork is mounted at ./m; see forkvol forks; store: store (FORKVOL_STORE)"
    );
    assert_eq!(lines[1..4], ["kept", "v@1", "kept"], "{lines:#?}");
    // The line at its end, and no warning.
    assert!(
        lines[4].starts_with("forkvol: v (exact hit, "),
        "{lines:#?}"
    );
    assert_eq!(lines[5..], ["more"], "{lines:#?}");
}

/// > Where an unmounted fork is still held out of sight, as by a container, `forkvol mount` ends that mount: whoever uses it gets
/// > EIO.
#[test]
fn a_mount_out_of_sight_gives_way_to_a_new_one_and_one_that_stands_does_not() {
    let lines = surrounded(
        r#"id=$(forkvol fork v m)
        echo one > m/f
        says forkvol mount "$id" n
        unshare --mount --propagation private sleep 100 &
        holder=$!
        until ! cmp -s /proc/$holder/mountinfo /proc/self/mountinfo; do sleep 0.01; done
        there() { nsenter --mount=/proc/$holder/ns/mnt "$@"; }
        umount m
        there cat "$WORK/m/f"
        forkvol mount "$id" n > out 2> err
        grep -o 'm was still in use by sleep .*another mount namespace' err | sed 's/[0-9]\+/PID/'
        cat n/f
        there cat "$WORK/m/f" 2> out || echo nothing there
        echo two > n/f
        umount n
        kill $holder
        forkvol commit "$id"
        forkvol run -v v -p c -- bash -c 'touch ready; until [ -e go ]; do sleep 0.01; done; cat c/f; echo three > c/f' > ran &
        run=$!
        until [ -e ready ]; do sleep 0.01; done
        id=$(forkvol forks | grep -o 'f-[0-9a-f]*')
        says forkvol mount "$id" n
        touch go
        wait $run
        cat ran
        forkvol cat v:f"#,
    );
    let refused =
        |line: &str| line.starts_with("15 fork f-") && line.contains("mounted already at");
    let (refusals, others): (Vec<&str>, Vec<&str>) = lines
        .iter()
        .map(String::as_str)
        .partition(|line| refused(line));
    assert_eq!(refusals.len(), 2, "{lines:#?}");
    let holder = "m was still in use by sleep (pid PID: another mount namespace";
    let expected = ["one", holder, "one", "nothing there", "v@1", "two", "three"];
    assert_eq!(others, expected, "{lines:#?}");
}

#[test]
fn a_store_that_cannot_be_one_is_refused_with_a_remedy() {
    let lines = surrounded(
        r#"mkdir -m 755 roots open strange
        chmod 777 open
        echo x > strange/thesis.tex
        echo x > file
        forkvol volumes
        says forkvol --store file volumes
        says forkvol --store file/x volumes
        says forkvol --store open volumes
        says forkvol --store strange volumes
        ls strange
        STORE=$WORK/roots says user forkvol volumes
        STORE=$WORK/roots/new says user forkvol volumes
        STORE=$WORK/store says user forkvol volumes
        user forkvol volumes
        user forkvol daemon stop
        says forkvol --store home/store volumes
        user forkvol volumes
        forkvol daemon stop
        echo format 99 > store/state
        says forkvol volumes
        cat store/state
        rm -r store/state
        (flock 9; says forkvol daemon run --socket "$WORK/other.sock") 9>> store/lock"#,
    );
    expect(
        &lines,
        &[
            ("1", &["file is not a folder"]),
            ("2", &["file/x", "--store"]),
            ("14", &["open can be written to by others", "chmod go-w"]),
            ("1", &["strange is not a store", "thesis.tex", "--store"]),
            ("thesis.tex", &[]),
            ("1", &["roots", "Permission denied", "--store"]),
            ("1", &["roots/new", "Permission denied", "--store"]),
            ("12", &["is not open to you", "--store"]),
            (
                "14",
                &["home/store belongs to user 65534", "run this as user 65534"],
            ),
            ("1", &["store has format 99", "use a newer forkvol"]),
            ("format", &["99"]),
            ("15", &["in use by another process", "--store"]),
        ],
    );
}

#[test]
fn a_store_on_fuse_is_refused_and_one_that_will_go_is_warned_of() {
    let lines = surrounded(
        r#"forkvol fork v m > out
        says forkvol --store m/store volumes
        ls m
        mkdir lower upper over memory
        mount -t tmpfs -o mode=700 none memory
        mount -t tmpfs none upper
        mkdir -m 700 upper/upper upper/work
        mount -t overlay -o lowerdir=lower,upperdir=upper/upper,workdir=upper/work none over
        for store in memory over/s; do
          forkvol --store $store volumes 2> err
          sed "s#$WORK/##; /warning: the daemon of/d" err
          forkvol --store $store volumes 2> err
          cat err
          forkvol --store $store daemon stop
        done"#,
    );
    expect(
        &lines,
        &[
            ("14", &["m/store lies on FUSE", "--store"]),
            (
                "forkvol:",
                &[
                    "warning",
                    "memory lies in memory and does not survive a reboot",
                ],
            ),
            (
                "forkvol:",
                &[
                    "warning",
                    "over/s lies on an overlay and goes with its container",
                ],
            ),
        ],
    );
}

/// The lines of a command that starts a daemon, and of the next one.
const STARTS: &str = r#"
    mount -t tmpfs none /run
    mkdir fake
    printf '#!/bin/bash\necho "${*%% -- *}" > %q/scoped\n[ ! -e %q/fails ] || exit 1\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n' \
      "$WORK" "$WORK" > fake/systemd-run
    chmod +x fake/systemd-run
    PATH=$WORK/fake:$PATH
    starts() {
      echo "$1:"
      forkvol volumes 2>&1 | sed "s#$WORK/##g"
      forkvol volumes 2>&1
      forkvol daemon stop
    }
"#;

#[test]
fn a_daemon_leaves_the_cgroup_of_who_starts_it_or_it_is_said_that_it_cannot() {
    let lines = surrounded(&format!(
        r#"{STARTS}
        touch /run/.containerenv
        starts container
        test ! -e scoped
        mkdir -p /run/systemd/system
        starts systemd
        cat scoped
        touch fails
        starts "no session""#
    ));
    let warning = "the daemon of store ends with this container or job, and its live forks with it; see forkvol doctor";
    expect(
        &lines,
        &[
            ("container:", &[]),
            ("forkvol:", &["warning", warning]),
            ("systemd:", &[]),
            ("--scope", &["--collect"]),
            ("no", &["session:"]),
            ("forkvol:", &["warning", warning]),
        ],
    );
}

#[test]
fn a_store_that_cannot_be_written_to_says_so_and_is_as_it_was() {
    let lines = surrounded(
        r#"mkdir ro full
        printf 'reserve = "0"\n' > config/forkvol/config.toml
        mount -t tmpfs -o mode=700 none ro
        forkvol --store ro/s run -v v -p c -- bash -c 'echo kept > c/f' 2> err
        forkvol --store ro/s daemon stop
        mount -o remount,ro ro
        says forkvol --store ro/s volumes
        says forkvol --store ro/new volumes
        { forkvol --store ro/s doctor 2> err || true; } | grep -o ' store: .*'
        says forkvol --store ro/s run -v v -p c -- true
        mount -o remount,rw ro
        forkvol --store ro/s cat v:f 2> err
        forkvol --store ro/s daemon stop
        mount -t tmpfs -o mode=700,size=200k none full
        head -c 300000 /dev/zero > full/filler 2> err || grep -o 'No space left' err
        says forkvol --store full/s volumes
        mount -o remount,size=200m full
        forkvol --store full/s run -v v -p c -- bash -c 'echo begun > c/f' 2> err
        forkvol --store full/s cat v:f 2> err
        forkvol --store full/s daemon stop"#,
    );
    expect(
        &lines,
        &[
            ("1", &["ro/s", "Read-only file system", "--store"]),
            ("1", &["ro/new", "Read-only file system", "--store"]),
            ("", &["store:", "ro/s", "Read-only file system"]),
            ("125", &["ro/s", "Read-only file system", "--store"]),
            ("kept", &[]),
            ("No", &["space left"]),
            ("16", &["full", "room"]),
            ("begun", &[]),
        ],
    );
}

#[test]
fn a_command_that_cannot_be_run_is_named_in_one_line_and_commits_nothing() {
    let lines = surrounded(
        r#"echo data > plain
        says forkvol run -v v -p c -- no-such-command
        says forkvol run -v v -p c -- ./no/such
        says forkvol run -v v -p c -- ./plain
        forkvol run -v v -p c -- bash -c 'echo x > c/f; kill -9 $$' 2> err || echo "status $?"
        forkvol log v --json | grep -o '"versions":\[\]'
        forkvol forks"#,
    );
    expect(
        &lines,
        &[
            ("127", &["no-such-command"]),
            ("127", &["./no/such"]),
            ("126", &["./plain"]),
            ("status", &["137"]),
            ("\"versions\":[]", &[]),
        ],
    );
}

#[test]
fn without_the_device_it_is_said_how_to_get_it_and_nothing_is_left() {
    let lines = surrounded(
        r#"forkvol volumes
        mkdir dev nodev
        mount -t tmpfs -o nodev none nodev
        mknod nodev/fuse c 10 229
        in_dev() { unshare --mount bash -ec "$1; says \"\$@\"" bash "${@:2}"; }
        export -f says
        without="mount -t tmpfs none dev; mknod dev/null c 1 3; mount --move dev /dev"
        in_dev "$without" forkvol fork v m
        in_dev "$without" forkvol run -v v -p c -- true
        in_dev "$without" forkvol attach --job 1 -v v -p c --env-file env --strict
        in_dev "mount --bind nodev/fuse /dev/fuse" forkvol fork v m
        chmod 600 fuse
        says user env PATH="$PATH" unshare --user --map-root-user --mount forkvol fork v m
        test ! -e m
        forkvol forks"#,
    );
    expect(
        &lines,
        &[
            (
                "1",
                &[
                    "/dev/fuse: No such file",
                    "modprobe fuse",
                    "--device /dev/fuse",
                ],
            ),
            (
                "125",
                &[
                    "/dev/fuse: No such file",
                    "modprobe fuse",
                    "--device /dev/fuse",
                ],
            ),
            (
                "1",
                &[
                    "/dev/fuse: No such file",
                    "modprobe fuse",
                    "--device /dev/fuse",
                ],
            ),
            (
                "1",
                &[
                    "/dev/fuse: Permission denied",
                    "nodev",
                    "--device /dev/fuse",
                ],
            ),
            ("1", &["/dev/fuse: Permission denied"]),
        ],
    );
}

#[test]
fn what_fusermount3_lacks_or_forbids_is_said_with_its_remedy() {
    let lines = surrounded(
        r#"mkdir -m 755 roots without
        for tool in /bin/*; do case $tool in */fusermount*) ;; *) ln -s $tool without/;; esac; done
        bare() { user env PATH="$WORK/bin:$WORK/without" "$@"; }
        says bare forkvol fork v m
        bare forkvol run -v v -p c -- bash -c 'echo x > c/f; ls c'
        says user forkvol fork v "$WORK/roots"
        says user forkvol fork v "$WORK/roots/m"
        echo '# nothing is said' > conf
        chmod 644 conf
        mount --bind conf /etc/fuse.conf
        user forkvol doctor | grep 'user_allow_other:'
        user forkvol fork v m > out
        findmnt -n -o OPTIONS home/m | grep -c allow_other || echo "closed to others"
        user touch m/f
        says bare forkvol commit ./m
        user fusermount3 -uz m
        echo user_allow_other > conf
        user forkvol fork v m > out
        findmnt -n -o OPTIONS home/m | grep -c allow_other
        echo 'mount_max = 1' > conf
        says user forkvol fork v m2
        says user forkvol run -v v -p c -- true
        test ! -e home/m2
        user forkvol abandon --all | wc -l"#,
    );
    expect(
        &lines,
        &[
            (
                "1",
                &["fusermount3 is not installed", "install the package fuse3"],
            ),
            ("f", &[]),
            ("1", &["no write access", "choose a folder of your own"]),
            (
                "1",
                &["roots/m: Permission denied", "choose a folder of your own"],
            ),
            ("warning", &["user_allow_other"]),
            ("0", &[]),
            ("closed", &["to others"]),
            ("0", &["cannot unmount", "fusermount3 -uz home/m"]),
            ("1", &[]),
            ("1", &["too many", "raise mount_max in /etc/fuse.conf"]),
            ("125", &["too many", "raise mount_max in /etc/fuse.conf"]),
            ("1", &[]),
        ],
    );
}

#[test]
fn a_path_need_not_be_text() {
    let cli = Cli::new();
    let call = |args: &[&OsStr]| {
        let output = cli.command(&[]).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        output.stdout
    };
    let words = |text: &'static str| text.split(' ').map(OsStr::new);
    let name = |name: &'static [u8]| OsStr::from_bytes(name);
    let mount = name(b"./m\xe9");
    call(&words("fork v").chain([mount]).collect::<Vec<_>>());
    let at = cli.dir.path().join(OsStr::from_bytes(b"m\xe9"));
    fs::write(at.join("f"), "text").unwrap();
    let forks = cli.json(&["forks"]);
    let path = &forks["forks"][0]["mount"]["path"];
    let bytes: forkvol::protocol::Bytes = serde_json::from_value(path.clone()).unwrap();
    assert!(path["b64"].is_string(), "{forks}");
    assert!(bytes.0.ends_with(b"/m\xe9"), "{forks}");
    call(&[OsStr::new("commit"), mount]);
    assert_eq!(cli.ok(&["cat", "v:f"]), "text");
    assert!(!at.exists());

    let script = "cd c* && cat f && echo more > g";
    let run = words("run --report r.json -v v -p").chain([name(b"c\xe9")]);
    let run = run.chain(words("-- bash -c")).chain([OsStr::new(script)]);
    assert_eq!(
        call(&run.collect::<Vec<_>>()),
        b"text\n".strip_suffix(b"\n").unwrap()
    );
    let report = fs::read_to_string(cli.path("r.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(
        report["run"]["volumes"][0]["paths"][0]["b64"].is_string(),
        "{report}"
    );

    let attach = words("attach --job 1 --env-file env -v v -p").chain([name(b"a\xe9")]);
    call(&attach.collect::<Vec<_>>());
    let attached = cli.dir.path().join(OsStr::from_bytes(b"a\xe9"));
    assert_eq!(fs::read_to_string(attached.join("g")).unwrap(), "more\n");
    fs::write(attached.join("h"), "last").unwrap();
    cli.ok(&["finish", "--job", "1", "--status", "0"]);
    assert_eq!(cli.ok(&["cat", "v:h"]), "last");

    let store = cli.dir.path().join(OsStr::from_bytes(b"s\xe9"));
    for command in [
        "volumes",
        "config --json",
        "doctor --json",
        "daemon status --json",
        "daemon stop",
    ] {
        let place = [OsStr::new("--store"), store.as_os_str()];
        call(&place.into_iter().chain(words(command)).collect::<Vec<_>>());
    }
}
