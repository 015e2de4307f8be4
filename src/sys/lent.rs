//! Memory that is lent to the kernel for a call, and can be taken back while the call waits.

use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

use super::check;

/// Pages of memory that calls read from.
#[derive(Debug)]
pub struct Lent {
    at: NonNull<u8>,
    len: usize,
    /// Some of it has been taken back.
    taken: AtomicBool,
}

// SAFETY: the memory is this value's alone; it is written through a unique borrow, and read by the kernel.
unsafe impl Send for Lent {}
// SAFETY: as above; protection is changed by calls that any thread may make.
unsafe impl Sync for Lent {}

/// The size of a page, in bytes.
pub fn page_size() -> usize {
    // SAFETY: it takes a number and changes nothing.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("every system says how large its pages are")
}

impl Lent {
    /// Makes room for `len` bytes, whole pages of them.
    pub fn new(len: usize) -> io::Result<Lent> {
        let len = len.next_multiple_of(page_size());
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory that is there.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        match NonNull::new(at.cast::<u8>()) {
            Some(at) if at.as_ptr().cast::<libc::c_void>() != libc::MAP_FAILED => Ok(Lent {
                at,
                len,
                taken: AtomicBool::new(false),
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The bytes, to be filled; what was taken back is here again.
    pub fn fill(&mut self) -> io::Result<&mut [u8]> {
        if *self.taken.get_mut() {
            self.protect(0..self.len, libc::PROT_READ | libc::PROT_WRITE)?;
            *self.taken.get_mut() = false;
        }
        // SAFETY: the mapping is as long as this says, can be written to, and is borrowed by nobody else.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) })
    }

    /// A part of the bytes as the argument of a call. Nobody but the kernel may look at them: they may be taken back.
    pub fn lend(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: it lies within the mapping, and nobody writes to that while it is borrowed.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().add(range.start), range.len()) }
    }

    /// Takes the pages that a part lies in back: a call that has not come to them yet fails there, with EFAULT.
    pub fn take_back(&self, range: Range<usize>) -> io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.len);
        self.taken.store(true, Ordering::Release);
        let start = range.start / page_size() * page_size();
        self.protect(start..range.end, libc::PROT_NONE)
    }

    /// `range` begins at a page.
    fn protect(&self, range: Range<usize>, protection: libc::c_int) -> io::Result<()> {
        // SAFETY: the pages lie within this value's mapping, of which there are no references but those of calls.
        check(unsafe {
            let at = self.at.as_ptr().add(range.start).cast();
            libc::mprotect(at, range.len(), protection)
        })
        .map(drop)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nobody has it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn what_is_taken_back_is_passed_to_no_call_until_it_is_filled_again() {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        let page = page_size();
        let mut lent = Lent::new(2 * page + 1).unwrap();
        lent.fill().unwrap().fill(7);
        lent.take_back(page + 1..page + 2).unwrap();
        writer.write_all(lent.lend(0..page)).unwrap();
        let refused = writer.write(lent.lend(page..page + 1)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EFAULT));
        writer.write_all(lent.lend(2 * page..2 * page + 1)).unwrap();
        assert!(lent.fill().unwrap().iter().all(|byte| *byte == 7));
        writer.write_all(lent.lend(page..page + 1)).unwrap();
        drop(writer);
        let mut through = Vec::new();
        reader.read_to_end(&mut through).unwrap();
        assert_eq!(through, vec![7; page + 2]);
    }
}
