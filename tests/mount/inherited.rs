//! Files that a fork inherited from its base: the same commands do the same to them as to files of the host's filesystem.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::{TestStore, sh};

/// What lies in the folder of each case: every kind of node, names in sticky and foreign folders, two names of one file.
const BASE: &str = r#"
umask 022; chmod 755 .
printf '%0100000d' 7 > f; printf one > g; printf two > x; chmod 4755 x; chown 65534:65534 g; chmod 664 g
printf hard > h; ln h h2; mkdir d full; printf in > full/in; mkdir sticky; chmod 1777 sticky; printf s > sticky/s
mkdir theirs; printf t > theirs/t; chown -R 65534:65534 theirs; mkdir group; chown 0:65534 group; chmod 2775 group
ln -s f l; ln -s nowhere dangling; mkfifo p; mknod c c 1 3; mknod b b 1 3; truncate -s 1M sparse; printf x >> sparse
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("sock")'; chmod 644 sparse
find . -exec touch -hd '2001-02-03 04:05:06.123456789' {} +
"#;

/// One case a line. `as nobody` is another user than the owner of most.
const CASES: &str = r#"
chmod 600 f
chmod 7777 f
chmod 0 d
chmod 1777 full
chmod 640 p c b sock
chmod 600 l
as_nobody chmod 600 f
as_nobody chmod 6755 g
as_nobody chmod 2755 theirs
chown 1:2 f
chown 1:2 x
chown -h 1:2 l
chown 1:2 l
chown 65534:65534 x d p c b sock
as_nobody chown 65534:65534 f
as_nobody chgrp 65534 g
as_nobody chown 1 g
truncate -s 0 f
truncate -s 10 f
truncate -s 5000 f
truncate -s 4096 f
truncate -s 200000 f
truncate -s 100000 f
truncate -s 0 x
as_nobody truncate -s 1 f
as_nobody truncate -s 1 g
truncate -s 1 d
truncate -s 600000 sparse
printf abc >> f
printf abc > f
printf abc >> x
printf abc | dd of=f bs=1 seek=50000 conv=notrunc status=none
printf abc | dd of=f bs=1 seek=300000 conv=notrunc status=none
printf abc | dd of=h2 bs=1 seek=1 conv=notrunc status=none
printf abc >> l
printf abc > dangling
as_nobody sh -c 'printf abc >> f'
as_nobody sh -c 'printf abc >> g'
fallocate -p -o 5000 -l 50000 f
fallocate -z -o 5000 -l 200000 f
fallocate -l 300000 f
fallocate -n -l 300000 f
fallocate -l 10 f
fallocate -zn -o 5000 -l 200000 f
chmod 6777 x; as_nobody truncate -s 1 x
chmod 6777 x; as_nobody sh -c 'printf abc >> x'
chmod 6777 x; as_nobody fallocate -p -o 0 -l 1 x
chmod 6777 x; as_nobody fallocate -l 10000 x
chmod 6777 x; fallocate -l 10000 x
chmod 6777 x; as_nobody python3 -c 'import os; os.copy_file_range(os.open("f", 0), os.open("x", 1), 9000)'
chmod 6777 x; as_nobody touch x
mv -T f new
mv -T f g
mv -T g x
mv -T h h2
mv -T h g
mv -T f d
mv -T d f
mv -T d full
mv -T full d
mv -T full sticky
mv -T d d/e
mv -T l g
mv -T f l
mv -T p g
mv -T sticky/s s
mv -T f full/in
mv -T full theirs/full
mv -T theirs/t d/t
mv -n f g
as_nobody mv -T sticky/s sticky/t
as_nobody mv -T theirs/t sticky/t
as_nobody mv -T theirs/t group/t
as_nobody mv -T f theirs/f
python3 -c 'import os; os.rename("missing", "f")'
python3 -c 'import os; os.rename("f", "full")'
python3 -c 'import os; os.rename("full", "f")'
python3 -c 'import os; os.rename("d", "full")'
python3 -c 'import os; os.rename("full", "full/in/x")'
python3 -c 'import os; os.rename("h", "h2")'
ln -T f new
ln -T h h3
ln -T f g
ln -T l l2
ln -T d d2
ln -T p theirs/p
ln -T c c2; ln -T b b2; ln -T sock sock2
as_nobody ln -T f theirs/f
as_nobody ln -T g theirs/g
ln -T f full/f; rm f; printf more >> full/f
rm f
rm h
rm h2 h
rm l dangling p c b sock
rm -r full
rm full/in; rmdir full
rmdir full
rmdir d
rmdir f
unlink d
as_nobody rm -f f
as_nobody rm -f sticky/s
as_nobody rm -f theirs/t
rm f; printf new > f
rmdir d; printf new > d
rm -r full; mkdir full
rm l; mkdir l
mkdir f
mkdir d
mkdir full/sub
mkdir group/sub; printf x > group/x
as_nobody mkdir group/sub
ln -sT x f
ln -sT x l
mkfifo p
mknod d/c c 5 1
touch f
touch -d '1999-01-01 00:00:00.000000001' f d p c
touch -hd '1999-01-01 00:00:00.000000001' l
touch -d '1930-01-01' f
touch -m g; touch -a x
as_nobody touch f
as_nobody touch g
setfattr -n user.k -v v f; setfattr -n trusted.k -v v d; getfattr -n user.k f
setfattr -n user.k -v v p
setfattr -x user.missing f
cat f g x h2 l full/in | sha256sum
exec 5<>f; rm f; printf abc >&5; ls; cat /proc/self/fd/5 | wc -c
exec 5<f; printf abc > f; cat <&5 | wc -c
cp -a . /tmp/forkvol-copy-$$; diff -r --no-dereference full /tmp/forkvol-copy-$$/full; rm -r /tmp/forkvol-copy-$$
cp --sparse=always f full/copy; cp --reflink=auto f copy; cmp f copy
"#;

/// Cases for a fork with ACLs, one a line.
const ACL_CASES: &str = r#"
setfacl -m u:4242:rw,g:4343:r f
setfacl -m u::r,g::rw,o::- f
setfacl -m u:4242:rwx f; chmod 640 f
setfacl -m u:4242:rwx f; chmod 6711 f
setfacl -m u:4242:rwx f; chown 12:34 f
setfacl -m u:4242:rwx f; setfacl -b f
setfacl -m u:4242:rwx f; setfacl -x u:4242 f
setfacl -m u:4242:rwx,m:r f; cp -p f copy; mv f moved; ln moved linked
setfacl -d -m u:4242:rwx d; umask 077; touch d/f; mkdir d/d; mkfifo d/p; mknod d/c c 1 3; ln -s x d/l
setfacl -d -m u:4242:rwx,m:r,o:- d; touch d/f; mkdir d/d; touch d/d/f; chmod 777 d/d/f
setfacl -d -m u::rx,g::x,o::w d; umask 0; touch d/f; mkdir d/d
setfacl -d -m u:4242:rwx group; mkdir group/d; touch group/f group/d/f
setfacl -d -m u:4242:rwx d; setfacl -k d; touch d/f
setfacl -d -m u:4242:rwx d; cp f d/f; mv g d/g; tar c x | tar x -C d; install -m 640 h d/h
setfacl -d -m u:4242:rwx f
setfacl -m u:65534:rw f; as_nobody sh -c 'printf abc >> f'
setfacl -m u:65534:- g; as_nobody sh -c 'printf abc >> g'
chmod 600 f; setfacl -m g:65534:rw,m:r f; as_nobody cat f | wc -c; as_nobody sh -c 'printf abc >> f'
setfacl -m u:65534:rwx d; as_nobody touch d/f; as_nobody rm d/f
as_nobody setfacl -m u:4242:rw f
as_nobody setfacl -m u:4242:rw g
setfacl -m u:4242:rw p c b sock
umask 027; touch new; mkdir newd; mkfifo newp
setfattr -n system.posix_acl_access -v 0x0200000001000600ffffffff f
setfattr -n system.posix_acl_access -v 0x02000000 f
setfattr -n system.posix_acl_access -v 0x03000000 f
setfattr -x system.posix_acl_access f
"#;

/// All that a case may have changed, and of the times whether it did.
const STATE: &str = r#"
before() { find . -printf '%p %C@ %T@\n' | sort > "$1"; }
after() {
  find . \( -type d -printf '%p %y %m %U %G %n\n' \) -o -printf '%p %y %m %U %G %n %s %l\n' | sort
  find . \( -type c -o -type b \) -exec stat -c '%n %t %T' {} + | sort
  find . -printf '%p %C@ %T@\n' | sort | join - "$1" | awk '{ print $1, $2 != $4 ? "ctime" : "-", $3 != $5 ? "mtime" : "-" }'
  find . -type f -exec sha256sum {} + | sort -k 2
  getfattr -hd -m '^(user|trusted)' -R . 2>/dev/null
  find . ! -type l -print0 | sort -z | xargs -0 getfacl -np
}
as_nobody() { setpriv --reuid 65534 --regid 65534 --clear-groups "$@"; }
export LC_ALL=C
"#;

fn numbered(cases: &str) -> impl Iterator<Item = (usize, &str)> {
    cases.trim().lines().enumerate()
}

/// Lays out one folder for each case.
fn lay_out(root: &Path, cases: &str) {
    fs::create_dir(root.join("first")).unwrap();
    sh(&root.join("first"), BASE);
    let last = numbered(cases).count() - 1;
    sh(
        root,
        &format!("chmod 755 .; for i in $(seq 0 {last}); do cp -a first case-$i; done"),
    );
}

/// Runs a case; returns its exit status, all it printed and what the folder came to.
fn run(root: &Path, number: usize, case: &str) -> String {
    let times = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "{STATE}\nbefore {times}\n( {case} ) 2>&1\necho \"status $?\"\nafter {times}",
        times = times.path().display()
    );
    let output = Command::new("bash")
        .args(["-c", &script])
        .current_dir(root.join(format!("case-{number}")))
        .output()
        .unwrap();
    assert!(output.stderr.is_empty(), "{case}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// > A version has regular files, directories, symbolic links, hard links, pipes, sockets and devices.
#[test]
fn what_the_base_brought_behaves_like_files_of_the_hosts_filesystem() {
    behaves_like_the_host(CASES, false);
}

/// > It has extended attributes (`user`, `trusted`, `security`), and POSIX ACLs with inheritance where the fork was made with
/// > `--acl` or its base has some.
#[test]
fn acls_behave_like_those_of_the_hosts_filesystem() {
    behaves_like_the_host(ACL_CASES, true);
}

fn behaves_like_the_host(cases: &str, acl: bool) {
    let store = TestStore::new();
    let host = tempfile::tempdir().unwrap();
    let fork = || store.fork_with("v", |request| request.acl = acl);
    let base = fork();
    lay_out(&base.path, cases);
    lay_out(host.path(), cases);
    store.commit(base);
    let mount = fork();
    let mut wrong = Vec::new();
    for (number, case) in numbered(cases) {
        let ours = run(&mount.path, number, case);
        let theirs = run(host.path(), number, case);
        if ours != theirs {
            wrong.push(format!(
                "{case}\non the fork:\n{}\non the host:\n{}",
                without(&ours, &theirs),
                without(&theirs, &ours)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    // A commit keeps what the commands came to.
    let state = format!("{STATE}\nbefore /dev/null; after /dev/null");
    let before = sh(&mount.path, &state);
    store.commit(mount);
    let after = sh(&fork().path, &state);
    let (lost, gained) = (without(&before, &after), without(&after, &before));
    assert!(before == after, "lost:\n{lost}\ngained:\n{gained}");
    store.check();
}

/// The lines that the other text does not have.
fn without(text: &str, other: &str) -> String {
    let lines = text
        .lines()
        .filter(|line| !other.lines().any(|o| o == *line));
    lines.map(|line| format!("  {line}\n")).collect()
}
