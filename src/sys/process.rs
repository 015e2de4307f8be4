//! Processes and signals: blocking and reading signals, starting a command with a clean mask, starting the daemon.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::check;

/// Whether a process that this one sees as `pid` lives in the same pid namespace. `process` makes sure that the number still means
/// it. On doubt it does not.
pub fn shares_pid_namespace(pid: i32, process: Option<BorrowedFd<'_>>) -> bool {
    // The numbers of a process, from the namespace of /proc inwards: one in a deeper namespace has more.
    let depth = |who: &str| -> Option<usize> {
        let status = fs::read_to_string(format!("/proc/{who}/status")).ok()?;
        let numbers = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))?;
        Some(numbers.split_whitespace().count())
    };
    if pid <= 0 {
        return false;
    }
    let same = matches!((depth("self"), depth(&pid.to_string())), (Some(own), Some(other)) if own == other);
    same && process.is_none_or(is_alive)
}

fn is_alive(process: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: process.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd is passed, which is valid for the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
}

/// Starts a thread in whose table of descriptors there is `keep` alone, under its own number. The kernel may keep the thread in a call
/// that nothing interrupts: when this process is killed meanwhile, all else that it had open is closed all the same.
///
/// The thread may use no other descriptor, and may not be the one that closes that number for the process.
pub fn spawn_with_only(
    name: &str,
    keep: RawFd,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (ready, readied) = mpsc::sync_channel(1);
    let thread = thread::Builder::new().name(name.into()).spawn(move || {
        let alone = keep_only(keep);
        let is_alone = alone.is_ok();
        if ready.send(alone).is_ok() && is_alone {
            work();
        }
    })?;
    readied.recv().map_err(io::Error::other)??;
    Ok(thread)
}

/// Gives this thread a table of descriptors of its own, with one of them.
fn keep_only(keep: RawFd) -> io::Result<()> {
    let number = libc::c_uint::try_from(keep).map_err(io::Error::other)?;
    // SAFETY: it takes a number.
    check(unsafe { libc::unshare(libc::CLONE_FILES) })?;
    let close = |first: libc::c_uint, last: libc::c_uint| {
        // SAFETY: this table is the thread's own, which has been told to use nothing of it.
        check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } as libc::c_int)
    };
    if let Some(below) = number.checked_sub(1) {
        close(0, below)?;
    }
    close(number + 1, libc::c_uint::MAX)?;
    Ok(())
}

/// How much this thread has had read from disks so far, in blocks of 512 bytes; 0 where the kernel does not count it.
pub fn blocks_read() -> i64 {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the pointer is to a rusage, which is read only if the call filled it.
    unsafe {
        match libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) {
            0 => usage.assume_init().ru_inblock,
            _ => 0,
        }
    }
}

/// Ends the process without the destructors of C++ statics, which take as long as a request and may meet threads that still run.
pub fn end(status: u8) -> ! {
    let _ = std::io::stdout().flush();
    // SAFETY: it takes a number and does not return.
    unsafe { libc::_exit(i32::from(status)) }
}

/// Runs the initializers of the database's C++, once, which are kept out of the start of the process (`build.rs`). Nothing of the
/// database may be used before it.
pub fn initialize_database() {
    type Initializer = extern "C" fn();
    unsafe extern "C" {
        static late_init_start: Initializer;
        static late_init_end: Initializer;
    }
    static DONE: std::sync::Once = std::sync::Once::new();
    DONE.call_once(|| {
        let (mut next, end) = (&raw const late_init_start, &raw const late_init_end);
        while next < end {
            // SAFETY: between the two symbols the linker put pointers to functions that take nothing and are made to run once each.
            unsafe {
                (*next)();
                next = next.add(1);
            }
        }
    });
}

/// A signal that was sent to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    pub number: i32,
    /// Sent by the kernel, as the terminal's Ctrl-C is, which reaches the whole process group at once.
    pub from_kernel: bool,
}

pub const SIGHUP: i32 = libc::SIGHUP;
pub const SIGINT: i32 = libc::SIGINT;
pub const SIGQUIT: i32 = libc::SIGQUIT;
pub const SIGTERM: i32 = libc::SIGTERM;
pub const SIGUSR1: i32 = libc::SIGUSR1;
pub const SIGUSR2: i32 = libc::SIGUSR2;
pub const SIGWINCH: i32 = libc::SIGWINCH;

/// Signals that are blocked for the whole process and read one by one. Made before any thread is started, for threads inherit
/// the mask.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

fn signal_set(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set; sigaddset with a wrong number changes nothing.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

impl Signals {
    /// Blocks `signals` in the calling thread and in those it starts from now on.
    pub fn block(signals: &[i32]) -> io::Result<Signals> {
        let set = signal_set(signals);
        // SAFETY: the set is initialised; the old mask is not asked for.
        check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
        // SAFETY: the set is initialised; -1 asks for a new descriptor.
        let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) })?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(Signals {
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    /// Returns the next signal, or `None` if none came in time.
    pub fn next(&self, timeout: Option<Duration>) -> io::Result<Option<Signal>> {
        if wait_readable(&[self.as_fd()], timeout)?.is_empty() {
            return Ok(None);
        }
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is writable for `size` bytes.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd gives whole records only, and one was read.
        let info = unsafe { info.assume_init() };
        Ok(Some(Signal {
            number: info.ssi_signo as i32,
            from_kernel: info.ssi_code > 0,
        }))
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.fd)
    }
}

/// Waits until some of the descriptors can be read; returns their places. Empty after the timeout.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<usize>> {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let millis = timeout.map_or(-1, |t| t.as_millis().min(i32::MAX as u128) as i32);
    loop {
        // SAFETY: `polls` is writable for its length.
        match check(unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, millis) })
        {
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(polls
        .iter()
        .enumerate()
        .filter(|(_, p)| p.revents != 0)
        .map(|(i, _)| i)
        .collect())
}

/// Returns a descriptor that can be read once the child has ended. Unlike SIGCHLD it does not depend on which thread a signal
/// finds.
pub fn end_of(child: &Child) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the child has not been waited for, so its number is its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    match RawFd::try_from(fd) {
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal to a process.
pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    let pid = pid
        .try_into()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: plain numbers.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Sends a signal to the calling thread, where a signal to the process might find another one.
#[cfg(test)]
pub fn raise_in_thread(signal: i32) {
    // SAFETY: a plain number.
    assert_eq!(unsafe { libc::raise(signal) }, 0);
}

/// Returns whether a process of this number exists, whoever owns it.
pub fn exists(pid: u32) -> bool {
    match kill(pid, 0) {
        Ok(()) => true,
        Err(e) => e.raw_os_error() == Some(libc::EPERM),
    }
}

/// Lets the command start with no signal blocked, whatever this process has blocked for itself.
pub fn with_clean_mask(command: &mut Command) -> &mut Command {
    let empty = signal_set(&[]);
    // SAFETY: sigprocmask is async-signal-safe and the set was made before the fork.
    unsafe {
        command.pre_exec(move || {
            check(libc::sigprocmask(
                libc::SIG_SETMASK,
                &raw const empty,
                std::ptr::null_mut(),
            ))
            .map(drop)
        })
    }
}

/// Makes the calling process the leader of a new session, without a terminal.
pub fn new_session() -> io::Result<()> {
    // SAFETY: no arguments.
    check(unsafe { libc::setsid() }).map(drop)
}

/// Takes standard output over and puts /dev/null in its place.
pub fn take_stdout() -> io::Result<fs::File> {
    let null = fs::File::options().write(true).open("/dev/null")?;
    let taken = std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned()?;
    // SAFETY: both descriptors are open; number 1 is replaced in one step.
    check(unsafe { libc::dup2(null.as_raw_fd(), 1) })?;
    Ok(taken.into())
}

/// Keeps large buffers out of the heap for good. glibc moves the border up to 32 MiB after the first one is freed, and from then on
/// zeroes each session's buffer of 16 MiB by hand, page by page, where fresh memory from the kernel is only taken as it is used.
pub fn large_buffers_from_kernel() {
    // SAFETY: plain numbers; called before other threads are started.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 << 20);
        // One arena a thread keeps what each of them once used.
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Sets the mask of file modes; returns the one before.
pub fn set_umask(mask: u32) -> u32 {
    // SAFETY: a plain number; umask cannot fail.
    unsafe { libc::umask(mask as libc::mode_t) as u32 }
}

/// Returns the effective user of this process.
pub fn euid() -> u32 {
    // SAFETY: no arguments; cannot fail.
    unsafe { libc::geteuid() }
}

/// Returns the effective group of this process.
pub fn egid() -> u32 {
    // SAFETY: no arguments; cannot fail.
    unsafe { libc::getegid() }
}

/// Restores the default action of SIGPIPE, which Rust ignores from the start: a reader that has seen enough is no error.
pub fn default_sigpipe() {
    // SAFETY: SIG_DFL is a valid handler and SIGPIPE a valid signal.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

const GROUPS: &str = "/etc/group";
const USERS: &str = "/etc/passwd";

/// Returns the number of the group `name`, or `None` if there is none.
pub fn group_id(name: &str) -> Option<u32> {
    id_in(GROUPS, name)
}

/// Returns the name of the group `id`, or `None` if it has none.
pub fn group_name(id: u32) -> Option<String> {
    let name = |row: &Row| String::from_utf8(row.name.to_vec()).ok();
    find(&fs::read(GROUPS).ok()?, |row| {
        (row.id == id).then(|| name(row)).flatten()
    })
}

/// Returns the id of the user `name`, or `None` if there is none.
pub fn user_id(name: &str) -> Option<u32> {
    id_in(USERS, name)
}

fn id_in(table: &str, name: &str) -> Option<u32> {
    find(&fs::read(table).ok()?, |row| {
        (row.name == name.as_bytes()).then_some(row.id)
    })
}

/// The home folder of the caller: HOME, or what `/etc/passwd` says. Who is in no table of this machine must name it: what the C
/// library asks for him would be loaded, and it is linked in, so that another one would come with it.
pub fn home() -> Option<PathBuf> {
    if let Some(home) = std::env::var_os("HOME").filter(|home| !home.is_empty()) {
        return Some(home.into());
    }
    home_in(&fs::read(USERS).ok()?, euid())
}

fn home_in(users: &[u8], uid: u32) -> Option<PathBuf> {
    let home = |row: &Row| row.rest.get(2).map(|home| OsStr::from_bytes(home).into());
    let found: Option<PathBuf> = find(users, |row| (row.id == uid).then(|| home(row)).flatten());
    found.filter(|home| !home.as_os_str().is_empty())
}

/// A line of a table of names and ids.
struct Row<'a> {
    name: &'a [u8],
    id: u32,
    /// The fields behind the id.
    rest: &'a [&'a [u8]],
}

/// Returns what `wanted` makes of the first row that it makes something of.
fn find<T>(table: &[u8], wanted: impl Fn(&Row) -> Option<T>) -> Option<T> {
    table.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        let [name, _, id, rest @ ..] = &fields[..] else {
            return None;
        };
        let id = std::str::from_utf8(id).ok()?.parse().ok()?;
        wanted(&Row { name, id, rest })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_of_a_user_is_the_sixth_field_of_his_line() {
        let table =
            b"root:x:0:0:root:/root:/bin/sh\nshort:x:7\nci:x:17:17::/srv/ci:\nnone:x:18:18:::\n";
        let home = |uid| home_in(table, uid);
        assert_eq!(home(0), Some("/root".into()));
        assert_eq!(home(17), Some("/srv/ci".into()));
        assert_eq!([7, 18, 1].map(home), [None, None, None]);
    }

    #[test]
    fn a_clean_mask_reaches_the_command() {
        std::thread::spawn(|| {
            let signals = Signals::block(&[SIGUSR1]).unwrap();
            assert_eq!(signals.next(Some(Duration::from_millis(1))).unwrap(), None);
            let mut command = Command::new("grep");
            command.args(["SigBlk", "/proc/self/status"]);
            let out = with_clean_mask(&mut command).output().unwrap();
            assert_eq!(
                String::from_utf8_lossy(&out.stdout).trim(),
                "SigBlk:\t0000000000000000"
            );
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_thread_with_one_descriptor_has_no_other_and_takes_none_from_the_process() {
        let (reader, writer) = std::io::pipe().unwrap();
        let number = writer.as_raw_fd();
        let open = || fs::read_dir("/proc/thread-self/fd").unwrap().count();
        let before = open();
        let thread = spawn_with_only("alone", number, move || {
            // One more is that of the listing itself.
            assert_eq!(open(), 2);
            assert!(fs::read_link(format!("/proc/thread-self/fd/{number}")).is_ok());
        });
        thread.unwrap().join().unwrap();
        assert_eq!(open(), before);
        drop((reader, writer));
    }

    #[test]
    fn processes_exist_or_not() {
        assert!(exists(std::process::id()));
        assert!(exists(1));
        assert!(!exists(i32::MAX as u32));
        assert!(!exists(u32::MAX));
    }

    #[test]
    fn groups_have_names_and_numbers() {
        assert_eq!(group_id("root"), Some(0));
        assert_eq!(group_name(0).as_deref(), Some("root"));
        assert_eq!(group_id("no such group"), None);
    }

    #[test]
    fn only_what_is_ready_is_returned() {
        use std::io::Write;
        use std::os::fd::AsFd;
        let (a, _keep) = std::io::pipe().unwrap();
        let (b, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"x").unwrap();
        let ready = wait_readable(&[a.as_fd(), b.as_fd()], Some(Duration::from_secs(5))).unwrap();
        assert_eq!(ready, [1]);
    }
}
