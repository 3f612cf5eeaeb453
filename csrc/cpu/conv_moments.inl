// The mean and the variance of a convolution's output in bfloat16, summed as its tiles are written: of every
// block of outputs by itself, and put together at the end in the order of the blocks.

template <class E>
class Moments {
  static constexpr int W = Vec::W;
  float* shift_;             // [block][channels], then sums of x - shift and of its square
  double *sum_, *square_;
  int64_t channels_;         // of all panels

 public:
  static size_t bytes(int64_t blocks, int64_t channels) {
    return blocks * channels * (sizeof(float) + 2 * sizeof(double));
  }
  Moments(char* memory, int64_t blocks, int64_t channels) : channels_(channels) {
    sum_ = reinterpret_cast<double*>(memory);
    square_ = sum_ + blocks * channels;
    shift_ = reinterpret_cast<float*>(square_ + blocks * channels);
  }

  // Adds so many rows of 2 W values, as they are stored; value(i) is a row of them. The first of a block
  // says around which values its sums are: the mean of some of them is near enough to all of them.
  template <class F>
  void add(int64_t block, int64_t channel, bool first, int64_t rows, const F& value) {
    float* shift = shift_ + block * channels_ + channel;
    double *sums = sum_ + block * channels_ + channel, *squares = square_ + block * channels_ + channel;
    if (first) {
      Vec::reg even = Vec::zero(), odd = Vec::zero();
      for (int64_t i = 0; i < rows; ++i) {
        const auto v = value(i);
        even = Vec::add(even, E::even(v));
        odd = Vec::add(odd, E::odd(v));
      }
      Vec::store(shift, bn_shift<E>(even, 1.0f / (float)rows));
      Vec::store(shift + W, bn_shift<E>(odd, 1.0f / (float)rows));
      memset(sums, 0, 2 * W * sizeof(double));
      memset(squares, 0, 2 * W * sizeof(double));
    }
    const Vec::reg shift_even = Vec::load(shift), shift_odd = Vec::load(shift + W);
    Vec::reg sum_even = Vec::zero(), sum_odd = Vec::zero();
    Vec::reg square_even = Vec::zero(), square_odd = Vec::zero();
    for (int64_t i = 0; i < rows; ++i) {
      const auto v = value(i);
      bn_add_moments<Vec>(E::even(v), shift_even, sum_even, square_even);
      bn_add_moments<Vec>(E::odd(v), shift_odd, sum_odd, square_odd);
    }
    Vec::add_to(sums, sum_even);
    Vec::add_to(sums + W, sum_odd);
    Vec::add_to(squares, square_even);
    Vec::add_to(squares + W, square_odd);
  }

  // The means and the biased variances of the channels of a panel, of which there are `channels` from its
  // first on; count(block) is how many values a block has of each.
  template <class F>
  void merge(int64_t blocks, int64_t channel, int64_t channels, const F& count, float* mean,
             float* var) const {
    double sum[2 * W] = {}, m2[2 * W] = {}, all = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t at = block * channels_ + channel;
      const double n = (double)count(block);
      const MomentsMerge merge(all, n);
      for (int i = 0; i < 2 * W; ++i) {
        double of_block, m2_of_block;
        unshifted(n, merge.by_n, shift_[at + i], sum_[at + i], square_[at + i], of_block, m2_of_block);
        merge.add(sum[i], m2[i], of_block, m2_of_block);
      }
      all += n;
    }
    for (int64_t i = 0; i < min64(2 * W, channels); ++i) {
      const int64_t at = i / 2 + i % 2 * W;
      mean[channel + i] = (float)(sum[at] / all);
      var[channel + i] = (float)(m2[at] / all);
    }
  }
};
