//! An ordinary user, who mounts through fusermount3 and may bind nothing.

use super::*;

/// Runs a script as a user with a home and a store of its own; `forkvol` is in its PATH.
fn as_user(script: &str) -> String {
    let work = Work::new();
    for folder in ["home", "run"] {
        work.home(folder, 65_534);
    }
    let all = format!(
        "trap 'forkvol daemon status > /dev/null 2>&1 && forkvol daemon stop --force' EXIT\ncd ~\n{script}"
    );
    let user =
        "exec setpriv --reuid 65534 --regid 65534 --clear-groups bash -euo pipefail -c \"$SCRIPT\"";
    let mut command = work.script(user);
    command
        .env("SCRIPT", all)
        .env("HOME", work.at("home"))
        .env("XDG_RUNTIME_DIR", work.at("run"))
        .env("FORKVOL_STORE", work.at("home/store"));
    printed(&mut command)
}

#[test]
fn a_fork_is_mounted_committed_and_abandoned_without_any_privilege() {
    let out = as_user(
        "forkvol --quiet fork v m > id
         echo data > m/file
         forkvol --quiet commit ./m
         test ! -e m
         forkvol --quiet fork v m > id
         cat m/file
         stat -c %u m/file
         rm m/file
         forkvol --quiet abandon \"$(cat id)\" > abandoned
         forkvol cat v:file",
    );
    assert_eq!(out, "v@1\ndata\n65534\ndata\n");
}

#[test]
fn a_job_gets_a_mount_for_each_of_its_paths_and_commits_them_as_one() {
    let out = as_user(
        "attach() { forkvol --quiet attach --job \"$1\" --env-file env -v v -p ~/.cache/a -p work/b; }
         attach 1
         echo one > ~/.cache/a/f
         echo two > work/b/f
         mv work/b/f work/b/g
         forkvol --quiet finish --job 1 --status 0
         test ! -e work && test ! -e ~/.cache/a/f
         attach 2
         cat ~/.cache/a/f work/b/g
         . ./env
         echo \"$FORKVOL_HIT\"
         findmnt -t fuse.forkvol -n -o TARGET | awk -v h=$HOME 'index($0, h)' | wc -l
         rm work/b/g
         forkvol --quiet finish --job 2 --status 1
         forkvol ls v | awk '{print $NF}'
         findmnt -t fuse.forkvol -n -o TARGET | awk -v h=$HOME 'index($0, h)' | wc -l",
    );
    assert_eq!(out, "one\ntwo\nexact\n2\n.cache__a\nwork__b\n0\n");
}

#[test]
fn run_gives_two_jobs_of_one_user_their_own_view_of_one_path() {
    let out = as_user(
        "mkdir .npm
         job() { forkvol --quiet run -v npm -p ~/.npm -- bash -c \"$1\"; }
         job 'echo a > ~/.npm/a; for n in {1..200}; do test -e ~/seen && break; sleep 0.05; done; ls ~/.npm' &
         for n in {1..200}; do forkvol forks --json | grep -q live && break; sleep 0.05; done
         job 'ls ~/.npm; echo b > ~/.npm/b; touch ~/seen'
         wait
         ls .npm
         forkvol ls npm | awk '{print $NF}'",
    );
    assert_eq!(out, "a\na\n");
}

#[test]
fn an_ordinary_user_cannot_join_a_workspace_and_is_told_what_can() {
    let out = as_user(
        "forkvol attach --strict --join w --job 1 -v v -p p 2>&1 || echo \"status $?\"
         forkvol attach --join w --job 1 -v v -p p --env-file env 2>/dev/null
         ls -d p",
    );
    assert!(
        out.contains("cannot be joined by an ordinary user; only who may bind"),
        "{out}"
    );
    assert!(out.ends_with("status 14\np\n"), "{out}");
}

#[test]
fn without_a_runtime_folder_a_fork_is_mounted_in_the_user_s_own_store() {
    let out = as_user(
        "unset XDG_RUNTIME_DIR
         export FORKVOL_STORE=~/s
         attach() { forkvol --quiet attach --strict --job 1 --env-file env -v shop/v \"$@\"; . ./env; }
         attach
         echo \"${FORKVOL_DIR_SHOP_V#$HOME/}\"
         echo data > \"$FORKVOL_DIR_SHOP_V/file\"
         forkvol --quiet finish --strict --job 1 --status 0
         ls -A s/mnt
         attach --link symlink -p link
         cat link/file
         forkvol --quiet finish --strict --job 1 --status 0
         ls -A s/mnt; test ! -L link
         forkvol check",
    );
    let lines: Vec<&str> = out.lines().take(2).collect();
    assert_eq!(lines, ["s/mnt/1/shop+v", "data"], "{out}");
}

#[test]
fn without_privilege_too_a_job_that_was_told_to_go_without_has_empty_folders() {
    let out = as_user(
        "attach() { forkvol --quiet attach --job 1 --env-file env -v v -p c -p d \"$@\" 2> said || { cat said >&2; exit 1; }; }
         attach
         echo kept | tee c/f > d/f
         forkvol --quiet finish --job 1 --status 0
         for ms in {2..40}; do
           attach --deadline ${ms}ms
           if grep -q 'goes without' said; then
             test -z \"$(ls -A c d | grep -v :)\" || { echo \"$ms ms: something is there\"; findmnt -t fuse.forkvol; }
             echo of a job without a cache | tee c/f > d/f
           fi
           forkvol --quiet finish --job 1 --status 0 2> said || cat said >&2
           rm -rf c d
         done
         forkvol cat v:c/f; forkvol cat v:d/f
         findmnt -t fuse.forkvol -n -o TARGET | awk -v h=$HOME 'index($0, h)' | wc -l",
    );
    assert_eq!(out, "kept\nkept\n0\n");
}
