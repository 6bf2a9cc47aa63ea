// A box of an 8-bit image, scaled, mirrored and normalised in one pass over memory: what torch's F.interpolate(mode="bilinear",
// antialias=True) makes of bytes, then / 255, - mean, / std, bit for bit. The arithmetic is Pillow's: a pass along rows, then one along columns,
// weights of 16 bits, each pass rounded to bytes. Sums are of integers, so their order changes no bit.
//
// For processors with AVX2; elsewhere torch serves. One thread, without the GIL. Rows that went through the first pass lie in a ring
// that the second one follows, so they stay in the first cache.
#include <immintrin.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "jpeg.h"

namespace py = pybind11;

namespace {

#define AVX2 __attribute__((target("avx2")))
using Bytes = py::array_t<uint8_t>;
using Floats = py::array_t<float, py::array::c_style>;

constexpr int kBlock = 8;    // pixels of a row that are made at once; rows in the ring are padded to a multiple of it
constexpr int kBeyond = 16;  // bytes that the first pass reads from the last pixel of a row on

// For each pixel of the result, the pixels of the source that it is made of: `taps` weights for those from `first` on.
struct Filter {
  int taps, precision;
  std::vector<int> first, count;
  std::vector<int16_t> weights;  // [size][taps]

  // As torch's HelperInterpBase::_compute_index_ranges_int16_weights, in doubles; `taps` is a multiple of `unit`.
  Filter(int source, int size, int unit, bool mirrored) : first(size), count(size) {
    const double scale = double(source) / size, support = std::max(scale, 1.0), inverse = scale >= 1 ? 1 / scale : 1;
    const int most = int(std::ceil(support)) * 2 + 1;
    std::vector<double> exact(size_t(size) * most);
    double largest = 0;
    for (int i = 0; i < size; ++i) {
      const double centre = scale * (i + 0.5);
      double* w = exact.data() + size_t(i) * most;
      first[i] = int(std::max<int64_t>(int64_t(centre - support + 0.5), 0));
      count[i] = int(std::clamp<int64_t>(std::min<int64_t>(int64_t(centre + support + 0.5), source) - first[i], 0, most));
      double sum = 0;
      for (int j = 0; j < count[i]; ++j) sum += w[j] = std::max(0.0, 1 - std::abs((j + first[i] - centre + 0.5) * inverse));
      if (sum != 0)
        for (int j = 0; j < count[i]; ++j) largest = std::max(largest, w[j] /= sum);
    }
    for (precision = 0; precision < 22; ++precision)
      if (int(0.5 + largest * (1 << (precision + 1))) >= 1 << 15) break;
    taps = (*std::max_element(count.begin(), count.end()) + unit - 1) / unit * unit;
    weights.assign(size_t(size) * taps, 0);
    for (int i = 0; i < size; ++i)
      for (int j = 0; j < count[i]; ++j)
        weights[size_t(mirrored ? size - 1 - i : i) * taps + j] = int16_t(exact[size_t(i) * most + j] * (1 << precision) + 0.5);
    if (mirrored) std::reverse(first.begin(), first.end()), std::reverse(count.begin(), count.end());
  }
};

struct Job {
  const uint8_t *source, *end;  // the box's first pixel; the end of the image's memory
  int64_t stride;               // bytes from row to row
  int channels, rows, columns, height, width;
  bool mirrored;
  const float *mean, *std;  // [channels]
  float* out;               // [channels, height, width]
};

// Grey has one byte of the ring for each pixel.
AVX2 void across_grey(const Job& job, const Filter& f, const uint8_t* row, uint8_t* to) {
  for (int x = 0; x < job.width; ++x) {
    const int16_t* w = f.weights.data() + size_t(x) * f.taps;
    int sum = 1 << (f.precision - 1);
    for (int k = 0; k < f.count[x]; ++k) sum += w[k] * row[f.first[x] + k];
    to[x] = uint8_t(std::min(sum >> f.precision, 255));
  }
}

AVX2 void down_grey(const Job& job, const Filter& f, int y, const uint8_t* const* rows) {
  const int16_t* w = f.weights.data() + size_t(y) * f.taps;
  float* to = job.out + int64_t(y) * job.width;
  for (int x = 0; x < job.width; ++x) {
    int sum = 1 << (f.precision - 1);
    for (int k = 0; k < f.count[y]; ++k) sum += w[k] * rows[k][x];
    to[x] = (float(std::min(sum >> f.precision, 255)) / 255.0f - job.mean[0]) / job.std[0];
  }
}

// Colours have four bytes, the last of which nobody looks at. Along rows two of them at once, one in each half of a register, and two
// pixels of each; four taps of a pixel are 12 of 16 bytes.
AVX2 void across_colour(const Job& job, const Filter& f, const uint8_t* row, const uint8_t* other, uint8_t* to,
                        uint8_t* other_to) {
  const __m256i first_two = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i last_two = _mm256_broadcastsi128_si256(_mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  const __m256i half = _mm256_set1_epi32(1 << (f.precision - 1));
  const __m128i shift = _mm_cvtsi32_si128(f.precision);
  for (int x = 0; x < job.width; x += 2) {
    __m256i sums[2];
    for (int i = 0; i < 2; ++i) {
      const int pixel = std::min(x + i, job.width - 1);
      const int64_t at = f.first[pixel] * 3;
      const int16_t* w = f.weights.data() + size_t(pixel) * f.taps;
      __m256i sum = half;
      for (int k = 0; k < f.taps; k += 4) {
        int32_t pairs[2];
        std::memcpy(pairs, w + k, sizeof pairs);
        const __m256i bytes = _mm256_loadu2_m128i((const __m128i*)(other + at + 3 * k), (const __m128i*)(row + at + 3 * k));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(bytes, first_two), _mm256_set1_epi32(pairs[0])));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(bytes, last_two), _mm256_set1_epi32(pairs[1])));
      }
      sums[i] = _mm256_sra_epi32(sum, shift);
    }
    const __m256i words = _mm256_packs_epi32(sums[0], sums[1]);
    const __m256i bytes = _mm256_packus_epi16(words, words);
    _mm_storel_epi64((__m128i*)(to + 4 * x), _mm256_castsi256_si128(bytes));
    _mm_storel_epi64((__m128i*)(other_to + 4 * x), _mm256_extracti128_si256(bytes, 1));
  }
}

AVX2 void down_colour(const Job& job, const Filter& f, int y, const uint8_t* const* rows) {
  const __m256i half = _mm256_set1_epi32(1 << (f.precision - 1)), zero = _mm256_setzero_si256();
  const __m128i shift = _mm_cvtsi32_si128(f.precision);
  const int16_t* w = f.weights.data() + size_t(y) * f.taps;
  for (int x = 0; x < job.width; x += kBlock) {
    __m256i a = half, b = half, c = half, d = half;
    for (int k = 0; k < f.taps; k += 2) {
      int32_t pair;
      std::memcpy(&pair, w + k, sizeof pair);
      const __m256i weights = _mm256_set1_epi32(pair);
      const __m256i upper = _mm256_loadu_si256((const __m256i*)(rows[k] + 4 * x));
      const __m256i lower = _mm256_loadu_si256((const __m256i*)(rows[k + 1] + 4 * x));
      const __m256i low = _mm256_unpacklo_epi8(upper, lower), high = _mm256_unpackhi_epi8(upper, lower);
      a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weights));
      b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weights));
      c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weights));
      d = _mm256_add_epi32(d, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weights));
    }
    const __m256i ab = _mm256_packs_epi32(_mm256_sra_epi32(a, shift), _mm256_sra_epi32(b, shift));
    const __m256i cd = _mm256_packs_epi32(_mm256_sra_epi32(c, shift), _mm256_sra_epi32(d, shift));
    __m256i pixels = _mm256_packus_epi16(ab, cd);  // unpacking and packing undo each other's order
    const int left = job.width - x;
    float* to = job.out + int64_t(y) * job.width + x;
    for (int channel = 0; channel < 3; ++channel, to += int64_t(job.height) * job.width) {
      const __m256 levels = _mm256_cvtepi32_ps(_mm256_and_si256(pixels, _mm256_set1_epi32(255)));
      const __m256 values = _mm256_div_ps(_mm256_sub_ps(_mm256_div_ps(levels, _mm256_set1_ps(255.0f)), _mm256_set1_ps(job.mean[channel])),
                                          _mm256_set1_ps(job.std[channel]));
      pixels = _mm256_srli_epi32(pixels, 8);
      if (left >= kBlock) {
        _mm256_storeu_ps(to, values);
      } else {
        float some[kBlock];
        _mm256_storeu_ps(some, values);
        std::memcpy(to, some, size_t(left) * sizeof(float));
      }
    }
  }
}

void run(const Job& job) {
  const bool grey = job.channels == 1;
  const Filter horizontal(job.columns, job.width, 4, job.mirrored), vertical(job.rows, job.height, 2, false);
  const int64_t line = int64_t(job.width + kBlock - 1) / kBlock * kBlock * (grey ? 1 : 4);
  const int slots = vertical.taps + 1;  // colours are made by twos, so one row may be made ahead
  std::vector<uint8_t> ring(size_t(slots) * line);
  const auto place = [&](int row) { return ring.data() + row % slots * line; };
  const int64_t length = int64_t(job.columns) * job.channels, read = length + 3 * horizontal.taps + kBeyond;
  std::vector<uint8_t> copies(2 * size_t(read));
  const auto row_at = [&](int row, int number) -> const uint8_t* {  // where the bytes behind its end may be read
    const uint8_t* at = job.source + row * job.stride;
    if (job.end - at >= read) return at;
    return static_cast<uint8_t*>(std::memcpy(copies.data() + number * read, at, size_t(length)));
  };
  std::vector<const uint8_t*> rows(vertical.taps);
  int made = 0;
  for (int y = 0; y < job.height; ++y) {
    const int first = vertical.first[y], last = first + vertical.count[y] - 1;
    while (made <= last) {
      const int other = grey ? made : std::min(made + 1, job.rows - 1);
      if (grey)
        across_grey(job, horizontal, job.source + made * job.stride, place(made));
      else
        across_colour(job, horizontal, row_at(made, 0), row_at(other, 1), place(made), place(other));
      made = other + 1;
    }
    for (int k = 0; k < vertical.taps; ++k) rows[k] = place(std::min(first + k, last));
    (grey ? down_grey : down_colour)(job, vertical, y, rows.data());
  }
}

// pixels: [H, W] or [H, W, 3], dense within a row; out: [C, h, w], C being 1 or 3; mean, std: [C]. The box is in whole pixels and not
// empty.
void cut(const Bytes& pixels, int64_t top, int64_t bottom, int64_t left, int64_t right, bool mirrored, const Floats& mean,
         const Floats& std, Floats& out) {
  const int64_t channels = pixels.ndim() == 3 ? pixels.shape(2) : 1;
  if (pixels.ndim() < 2 || pixels.ndim() > 3 || (channels != 1 && channels != 3))
    throw std::invalid_argument("pixels: not [H, W] or [H, W, 3]");
  if (pixels.strides(1) != channels || (pixels.ndim() == 3 && pixels.strides(2) != 1) || pixels.strides(0) < 0)
    throw std::invalid_argument("pixels: not dense within a row");
  if (out.ndim() != 3 || out.shape(0) != channels || !out.size())
    throw std::invalid_argument("out: not [C, h, w] of the same channels");
  if (mean.size() != channels || std.size() != channels) throw std::invalid_argument("mean, std: not one for each channel");
  if (top < 0 || left < 0 || top >= bottom || left >= right || bottom > pixels.shape(0) || right > pixels.shape(1))
    throw std::invalid_argument("the box is empty or not within the image");
  const int64_t stride = pixels.strides(0);
  const uint8_t *source = pixels.data(), *end = source + (pixels.shape(0) - 1) * stride + pixels.shape(1) * channels;
  const Job job{source + top * stride + left * channels, end, stride, int(channels), int(bottom - top), int(right - left),
                int(out.shape(1)), int(out.shape(2)), mirrored, mean.data(), std.data(), out.mutable_data()};
  const py::gil_scoped_release release;
  run(job);
}

// to: [bottom - top, room, C], where what is decoded of the rows lies from column `left` less the result on; -1: nothing was.
int64_t jpeg_part(const std::array<uintptr_t, 9>& functions, const py::bytes& file, std::array<uint32_t, 2> size,
                  std::array<uint32_t, 4> edges, Bytes& to) {
  const auto [height, width] = size;
  const auto [top, bottom, left, right] = edges;
  if (top >= bottom || left >= right || bottom > height || right > width)
    throw std::invalid_argument("the box is empty or not within the image");
  if (to.ndim() != 3 || to.shape(0) != bottom - top || !to.size() || to.strides(2) != 1 || to.strides(1) != to.shape(2) ||
      to.strides(0) != to.shape(1) * to.shape(2))
    throw std::invalid_argument("to: not [bottom - top, room, C], dense");
  jpeg::Library library;
  static_assert(sizeof library == sizeof functions);
  std::memcpy(&library, functions.data(), sizeof library);
  const std::string_view content = file;
  const jpeg::Part part{(const uint8_t*)content.data(), content.size(), width, height, top, bottom, left, right, int(to.shape(2)),
                        to.mutable_data(), uint32_t(to.shape(1))};
  const py::gil_scoped_release release;
  return jpeg::decode(library, part);
}

}  // namespace

PYBIND11_MODULE(_pixels, m) {
  m.doc() = "Vitruvius: boxes of images, decoded and scaled";
  m.def("runs", [] { return bool(__builtin_cpu_supports("avx2")); }, "Whether this processor can.");
  m.def("cut", &cut, py::arg("pixels").noconvert(), py::arg("top"), py::arg("bottom"), py::arg("left"), py::arg("right"),
        py::arg("mirrored"), py::arg("mean").noconvert(), py::arg("std").noconvert(), py::arg("out").noconvert());
  m.def("jpeg_part", &jpeg_part, py::arg("functions"), py::arg("file"), py::arg("size"), py::arg("edges"), py::arg("to").noconvert());
}
